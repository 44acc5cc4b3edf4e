"""What a run will need and take on a given cluster, before anything runs. Start at `sweep.make_plan`."""
