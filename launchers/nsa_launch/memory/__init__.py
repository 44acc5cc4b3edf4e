"""Ranks that ran out of memory: what they write down, and what is said of it beside the planner's table."""
