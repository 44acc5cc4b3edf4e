"""Commands of `nsa-dist` that start nothing. Those that do: `on_ray`, `bench`, `torchrun`."""
