"""From a run's checkpoint to a model in plain PyTorch."""
