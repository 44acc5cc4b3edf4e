"""The health of a run: steps that are not finite, slow ranks, gates and selection, replicas that drift apart."""
