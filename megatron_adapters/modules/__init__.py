"""Ready-made modules: the models of RLHF, from YAML alone."""
