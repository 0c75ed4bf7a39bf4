"""Training schedules: YAML with what acts in which epochs."""
