"""Which blocks one head selects over a whole validation sequence."""

from torch import Tensor

from nsa_dist.train.data.batches import BatchCutter
from nsa_dist.train.data.samples import SampleSource
from nsa_dist.train.model import Trainable
from nsa_dist.train.step import evaluate
from nsa_dist.train.world import World


def selected_blocks(model: Trainable, cutter: BatchCutter, dataset: SampleSource, layer: int, world: World) -> Tensor:
    """int32 [N, n]: the block ids (-1 for none) of the first head in this stage's `layer`, by token of the sequence.

    Runs the first batch of `dataset` through the model, on every process.
    """
    with model.attentions[layer].core_attention.recording_blocks() as recorded:
        evaluate(model, cutter, dataset, 1, world)
    first_head = recorded[0][:, 0].contiguous()  # [T, n]
    return cutter.plan.unshard(list(world.cp.all_gather(first_head, "selection"))).cpu()
