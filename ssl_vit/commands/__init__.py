"""One module a command line, and what the training commands are made of."""
