"""Parts of `nsa_dist.train.config`: what every section is, and the one about data."""
