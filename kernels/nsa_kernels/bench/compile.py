"""Fill triton's cache on disk before anything is timed: every call of every shape, many at once."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import torch
from torch import Tensor

from nsa_kernels.bench.branches import Branch, branches
from nsa_kernels.bench.cases import Case
from nsa_kernels.bench.inputs import CONFIG, make_inputs

TOKENS = 8192  # kernels are the same at any length


def compile_cases(cases: list[Case], jobs: int) -> None:
    """Run every call of the cases once, in `jobs` processes, cases of one shape together."""
    shapes = {(case.num_q_heads, case.num_kv_heads, case.dim_k, case.dim_v) for case in cases}
    short = [Case(TOKENS, *shape) for shape in sorted(shapes)]
    names = [branch.name for branch in branches_alone(Case(1024, 2, 1, 16, 16), "cpu")]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_run_once, asdict(case), name) for name in names for case in short]:
            future.result()


def branches_alone(case: Case, device: str = "cuda"):
    """The calls of a layer, each with made-up results of those before it, so that none has to run for another."""
    for branch in branches(make_inputs(case, device)):
        branch.output = _made_up(branch, case)
        yield branch


def _run_once(fields: dict, name: str) -> None:
    branch = next(b for b in branches_alone(Case(**fields)) if b.name == name)
    output = branch.forward()
    if branch.leaves:
        branch.backward(output, torch.ones_like(output[0] if isinstance(output, tuple) else output))()
    torch.cuda.synchronize()


def _made_up(branch: Branch, case: Case) -> Tensor | tuple[Tensor, Tensor]:
    q = next(iter(branch.tensors.values()))
    if branch.function == "compress_mlp":
        return q.new_zeros(len(branch.others["block_rows"]), *q.shape[1:])
    if branch.function == "select_blocks":  # the first blocks
        ids = torch.arange(CONFIG.num_slc_blocks, dtype=torch.int32, device=q.device)
        own = branch.others["position"] // CONFIG.slc_block_len
        return torch.where(ids <= own[:, None], ids, -1)[:, None].repeat(1, case.num_kv_heads, 1)
    if branch.gate is None:
        return q
    lse = torch.zeros(q.shape[:2], device=q.device)
    return q.new_zeros(*q.shape[:2], case.dim_v), lse
