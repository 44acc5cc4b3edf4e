"""A GPT of your own in Megatron-core with Native Sparse Attention layers: a few training steps in one process.

    python examples/gpt_model.py

On a GPU as it is; without one, `megatron_on_cpu` lets Megatron-core run on the CPU. Over several ranks the process
group, the parallel sizes and the cutting of batches change, and nothing else: see the remarks.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from nsa_dist import NSAConfig
from nsa_dist.mcore import NSATransformerConfig, nsa_block_spec
from nsa_dist.mcore.cpu import megatron_on_cpu

SEQUENCE, BATCH, VOCAB, STEPS = 256, 2, 256, 8


def main():
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    # One process. With torchrun: dist.init_process_group("nccl"), and parallel sizes whose product divides the ranks.
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, context_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)

    config = NSATransformerConfig(  # a TransformerConfig, with `nsa` and other fields that begin with nsa_
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,  # two key/value heads, each shared by two query heads
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=not on_gpu,
        nsa=NSAConfig(num_slc_blocks=4, window_len=64),
        # context_parallel_size=8, calculate_per_token_loss=True,   # and cut batches with get_batch_on_this_cp_rank
    )
    model = GPTModel(
        config,
        nsa_block_spec(config),  # the one line that puts NSA into the layers
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="none",  # the layer turns queries and keys itself
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # Something to learn: bytes that count up, each sequence from a start of its own.
    start = torch.randint(VOCAB, (BATCH, 1), device=device)
    text = (start + torch.arange(SEQUENCE + 1, device=device)) % VOCAB
    tokens, labels = text[:, :-1], text[:, 1:]
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)  # GPTModel wants them; NSA layers do not
    for step in range(1, STEPS + 1):
        loss = model(tokens, positions, attention_mask=None, labels=labels).mean()  # causal: no mask is needed
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2}  loss {loss.item():.3f}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    with megatron_on_cpu():  # does nothing on a machine with a GPU
        main()
