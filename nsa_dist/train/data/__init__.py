"""Text files, packed into tokens, cut into samples and batches."""
