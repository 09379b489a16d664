"""The command line: train, eval, check."""
