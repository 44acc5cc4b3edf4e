"""Which blocks one head selects over a whole validation sequence, or over a document of one."""

from itertools import pairwise

from torch import Tensor

from nsa_dist.train.data.batches import BatchCutter
from nsa_dist.train.data.packs import Pack
from nsa_dist.train.data.samples import SampleSource
from nsa_dist.train.model import Trainable
from nsa_dist.train.step import evaluate
from nsa_dist.train.world import World


def selected_blocks(model: Trainable, cutter: BatchCutter, dataset: SampleSource, world: World) -> Tensor | None:
    """int32 [N, n]: the block ids (-1 for none) of the first head in this stage's last NSA layer, by token.

    Runs the first batch of `dataset` through the model, on every process. Of packed documents it is the longest of the
    first micro-batch. None for a stage without NSA layers.
    """
    attentions = [each for layer, each in model.attentions.items() if layer < model.config.num_layers]
    if not attentions:
        evaluate(model, cutter, dataset, 1, world)
        return None
    pack = next(cutter.micro_batches(dataset, 0)).pack  # which the evaluation finds made, as the newest are kept
    with attentions[-1].core_attention.recording_blocks() as recorded:
        evaluate(model, cutter, dataset, 1, world)
    first_head = recorded[0][:, 0].contiguous()  # [T, n]
    shards = list(world.cp.all_gather(first_head, "selection"))
    return (cutter.plan.unshard(shards) if pack is None else _of_longest(shards, pack)).cpu()


def _of_longest(shards: list[Tensor], pack: Pack) -> Tensor:
    """Of the longest document, with ids from its first block on."""
    plan = pack.rank_plan.plan
    blocks = shards[0] if plan.cp_size == 1 else plan.unshard(shards)
    lengths = [b - a for a, b in pairwise(pack.bounds)]
    which = max(range(len(lengths)), key=lambda i: lengths[i])
    first = sum(-(-(b - a) // plan.block_len) for a, b in list(pairwise(plan.cu_seqlens))[:which])
    blocks = blocks[plan.cu_seqlens[which] :][: lengths[which]]
    return blocks.where(blocks < 0, blocks - first)
