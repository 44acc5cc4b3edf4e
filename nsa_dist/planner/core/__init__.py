"""One attention layer on one rank: its memory, its seconds, its bytes, by the way in which remote K and V come in."""
