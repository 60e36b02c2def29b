"""Sweeps: many trainings of one configuration, of which validation chooses the best; by Optuna, or a file for W&B's."""
