"""Ray: the driver that starts a run and watches it, and the workers in which ranks live."""
