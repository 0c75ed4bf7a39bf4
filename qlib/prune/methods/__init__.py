"""Pruning methods that need no training, one a file: scores of weights, of which those of the least are removed."""
