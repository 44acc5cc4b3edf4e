"""From a dense model in a folder of Hugging Face's to one of NSA layers in a folder that `nsa_dist.inference` reads."""
