"""Training under a schedule."""
