"""Closed formulas: bytes that context parallelism sends (`cost`), keys and FLOPs of a rank (`work`)."""
