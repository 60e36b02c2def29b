"""Measurements on the user's own machine: what pictures cost (`data`), and what the training loop costs (`train`)."""
