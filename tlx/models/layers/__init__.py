"""A network cut into layers: one traced pass, units, groups, and the layer of every parameter."""
