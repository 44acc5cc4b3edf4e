"""What people see of a run through Ray: words while it starts, Ray's own messages, metrics."""
