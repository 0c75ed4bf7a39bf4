"""Models of other shapes."""
