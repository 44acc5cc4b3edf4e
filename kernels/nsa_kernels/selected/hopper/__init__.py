"""Selected attention on Hopper GPUs, in Gluon: what `tiles.hopper_takes`."""
