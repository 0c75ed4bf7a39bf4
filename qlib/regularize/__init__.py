"""Regularizers: losses that drive weights, or groups of them, to zero."""
