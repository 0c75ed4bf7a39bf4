"""Methods that order the channels of a model by what their removal costs, one a file."""
