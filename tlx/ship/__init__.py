"""A trained network for other programs: exported, loaded as they load it, and compared with the model itself before it
gets its name."""
