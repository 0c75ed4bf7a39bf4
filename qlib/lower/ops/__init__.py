"""The exact form of each layer kind, one kind or family of kinds a file."""
