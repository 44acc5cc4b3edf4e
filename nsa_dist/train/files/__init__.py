"""The folder of a run: what lies in it, how it is written, and what may be replaced."""
