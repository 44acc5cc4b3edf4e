"""`nsa-dist convert`."""
