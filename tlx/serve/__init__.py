"""A trained network over HTTP: from pictures that strangers send to rows as `tlx predict` gives them."""
