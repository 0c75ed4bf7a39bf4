"""Corrections that need no training: they change weights, biases and grids so that the integers lose less."""
