"""Few tokens a rank: every transport in turn, and one that takes no time."""
