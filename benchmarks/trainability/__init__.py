"""Trainability: configurations of Skipway and plain torch networks, with the outcome of their training."""
