"""What `nsa-dist bench` measures of context parallelism. START HERE: `case` (what), `tasks` (how, on every rank)."""
