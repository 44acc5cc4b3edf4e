"""`nsa-dist bench decode`: one layer, one new token a sequence. START HERE: `case` (what), `measure` (how), `run`."""
