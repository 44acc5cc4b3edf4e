"""The launcher: a command line, Ray Train, torchrun. It starts `nsa_dist.train` and knows what surrounds a run."""
