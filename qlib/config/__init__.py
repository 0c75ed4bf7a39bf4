"""Settings from YAML files and from the command line, checked and resolved for each layer."""
