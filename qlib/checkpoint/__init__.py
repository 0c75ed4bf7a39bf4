"""Checkpoints: files read as data, weights fitted to a model, integers with their plan."""
