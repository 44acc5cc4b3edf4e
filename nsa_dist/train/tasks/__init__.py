"""Drawn tasks that need what stands far back, mixed into the texts of a run, and how often a model answers them."""
