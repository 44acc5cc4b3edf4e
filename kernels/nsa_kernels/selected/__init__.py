"""Attention to the selected blocks, the branch slc: `attention` is the face; `forward`, `backward` say what runs."""
