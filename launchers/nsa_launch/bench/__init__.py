"""`nsa-dist bench`: context parallelism measured. START HERE: `solo` (one rank of many) and `ranks` (a rank a GPU)."""
