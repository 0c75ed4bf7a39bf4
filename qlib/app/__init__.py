"""What a command line does: the only package that knows the run."""
