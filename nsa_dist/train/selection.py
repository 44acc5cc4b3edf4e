"""Which blocks one head selects over a whole validation sequence."""

from torch import Tensor

from nsa_dist.train.data.batches import BatchCutter
from nsa_dist.train.data.samples import SampleSource
from nsa_dist.train.model import Trainable
from nsa_dist.train.step import evaluate
from nsa_dist.train.world import World


def selected_blocks(model: Trainable, cutter: BatchCutter, dataset: SampleSource, world: World) -> Tensor | None:
    """int32 [N, n]: the block ids (-1 for none) of the first head in this stage's last NSA layer, by token.

    Runs the first batch of `dataset` through the model, on every process. None for a stage without NSA layers.
    """
    if not model.attentions:
        evaluate(model, cutter, dataset, 1, world)
        return None
    with model.attentions[-1].core_attention.recording_blocks() as recorded:
        evaluate(model, cutter, dataset, 1, world)
    first_head = recorded[0][:, 0].contiguous()  # [T, n]
    return cutter.plan.unshard(list(world.cp.all_gather(first_head, "selection"))).cpu()
