"""The files beside this one run in a copy of the package alone, where their methods are registered."""

collect_ignore_glob = ["*.py"]
