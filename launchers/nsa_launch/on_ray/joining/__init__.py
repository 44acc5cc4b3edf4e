"""A cluster that is there already: its address, whether it answers, and the token that it wants."""
