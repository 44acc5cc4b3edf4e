"""Between a run's weights and a model in plain PyTorch, both ways."""
