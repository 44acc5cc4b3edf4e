"""Layers of experts in a run: who takes which token, and how evenly."""
