"""Compression (section 3.3.1): `compress` is the face, `mlp` and `mean` its kernels, `tiles` their sizes."""
