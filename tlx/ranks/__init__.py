"""Processes of one training: how they meet, what they compute together, who was given what, who is alive."""
