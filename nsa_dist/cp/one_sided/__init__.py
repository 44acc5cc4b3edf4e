"""One-sided transport: ranks whose GPUs see each other's memory read what they need where it lies."""
