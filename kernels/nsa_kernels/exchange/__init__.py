"""Copies between the memories of GPUs that see each other's: `signals` say when, `parts` and `pages` move what.

Who is who is the caller's to know: here there are addresses, offsets and numbers of members.
"""
