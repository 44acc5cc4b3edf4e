"""Multi-token prediction in a run: layers that predict tokens behind the next one, while it trains."""
