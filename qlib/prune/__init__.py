"""Pruning: which weights are kept, and how they are chosen."""
