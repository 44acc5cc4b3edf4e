"""The plans that tests of the planner share."""

from functools import cache

from nsa_dist.planner.cluster import DEFAULT_CLUSTER, Cluster, load_cluster
from nsa_dist.planner.sweep import make_plan
from nsa_dist.train.config import ModelSection, RunSection, TrainConfig


def long_config(**sections) -> TrainConfig:
    """A million tokens through a model that fills eight GPUs."""
    given = {
        "run": RunSection(output_dir="unused", sequence_length=2**20, dtype="bf16"),
        "model": ModelSection(
            num_layers=4, hidden_size=2048, num_attention_heads=64, num_query_groups=4, head_dim=128,
            ffn_hidden_size=5632, recompute_attention=True,
        ),
    }  # fmt: skip
    return TrainConfig(**(given | sections))


@cache
def cluster() -> Cluster:
    return load_cluster(DEFAULT_CLUSTER)


@cache
def long_plan():
    return make_plan(long_config(), cluster())
