"""What runs in the process of each rank, whoever started it."""
