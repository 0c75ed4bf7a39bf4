"""Distillation: the loss against a teacher, and the matching of what layers compute."""
