"""Environment of a rank on GPUs that torch reads when a process group is made, whoever starts the ranks."""

from math import ceil

from nsa_launch.hangs.signs import beat_s


def of_nccl(num_ranks: int) -> dict[str, str]:
    """How a process ends in which a collective timed out.

    Torch waits four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC between the two, 60 s if nothing is said, so that ranks
    may write down what they did. Here it is four beats of the signs of life, in which a rank says who hung.
    """
    return {
        # The process ends with its kernels waiting. 1, which Ray and torchrun set, aborts them first, and training goes
        # on with what they left for a result until the end comes, which took up to 25 s more (torch 2.11).
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": str(ceil(1000 * beat_s(num_ranks))),
        # Ranks read each other's memory (`nsa_dist.cp.one_sided`). Where each sees one GPU, all say number 0, which
        # torch would take for one and the same; whether it is, the ranks compare by the GPUs' own names.
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # nobody multicasts, and setting it up fails on some machines
    }
