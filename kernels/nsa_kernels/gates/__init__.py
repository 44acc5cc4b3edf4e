"""Passes over rows: `combine` under gates, `deltas` before the backward, `sums` after, `merge` of parts."""
