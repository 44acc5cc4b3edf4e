"""What the operators share: tiles, strides, wild rows, Hopper's building blocks, and what these kernels can take."""
