"""The kernels' benchmark: `python kernels/bench/run.py`, `nsa-dist bench kernels`, `python -m nsa_kernels.bench`.

It alone of this package looks above it: the layer is measured as its users call it, through `nsa_dist.nsa_attention`.
"""
