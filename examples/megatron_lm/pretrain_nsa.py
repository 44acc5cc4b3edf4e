"""Stock Megatron-LM trains a GPT whose layers are Native Sparse Attention. Nothing of Megatron-LM is changed.

    export PYTHONPATH=/path/to/Megatron-LM
    torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_nsa.py \\
        --context-parallel-size 8 --calculate-per-token-loss ... --nsa-num-slc-blocks 16 --nsa-window-len 512

Every argument of `pretrain_gpt.py`, and `--nsa-...`; README.md beside this file has a whole command line. What NSA
layers would not do is refused, with what to write instead. A script of your own takes the parts that it needs from
`nsa_dist.mcore.megatron_lm`.
"""

from nsa_dist.mcore.megatron_lm import pretrain

if __name__ == "__main__":
    pretrain()
