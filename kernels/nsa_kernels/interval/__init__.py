"""Attention to [begin, end), the branches cmp and win: `attention` is the face and says which kernel is where."""
