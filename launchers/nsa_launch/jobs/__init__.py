"""A run on somebody else's machines: jobs of a Ray cluster, and files for Kubernetes and Slurm."""
