"""The flags of the command line: their table, their values, and what they need of each other."""
