"""`nsa-dist bench`: its words, and the processes that measure. START HERE: `share` (one rank of many), `ranks`."""
