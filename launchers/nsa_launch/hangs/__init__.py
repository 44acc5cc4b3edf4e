"""Ranks that hang: their signs of life, who watches them, and what is said."""
