"""The rows of the flag table, a file for each part of `--help`."""
