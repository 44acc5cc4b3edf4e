"""`nsa-dist bench generate`: a model from a long prompt on, and the same with dense attention. START HERE: `run`."""
