"""Classes of ours that go into checkpoints with the arguments of a run: once this is imported, torch.load knows them.

torch.load(weights_only=True) goes by their names, those of earlier versions too.
"""

from torch.serialization import add_safe_globals

from nsa_dist.config import NSAConfig
from nsa_dist.cp.options import FetchOptions
from nsa_dist.rope_scaling import Llama3Scaling, YarnScaling

add_safe_globals([NSAConfig, FetchOptions, (FetchOptions, "nsa_dist.cp.fetch.FetchOptions")])
add_safe_globals([Llama3Scaling, YarnScaling])
