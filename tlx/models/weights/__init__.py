"""Weights: where they are, what a file holds, and how its values become those of a network."""
