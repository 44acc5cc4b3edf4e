"""Every example as it stands: its own process, from an empty folder."""

import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from example_cases import EXAMPLES, loss_of_built_model, pretrain_nsa
from nsa_dist import NSAConfig
from ranks import run_ranks

MEGATRON_LM = os.environ.get("MEGATRON_LM")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_in_the_list():
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"[{path.name}" in listed


def test_attention(tmp_path):
    text = said(run(tmp_path, EXAMPLES / "attention.py"))
    blocks = [int(n) for n in re.search(r"chose the blocks \[(.*)\]", text)[1].split(", ")]
    assert blocks == sorted(set(blocks))
    assert len(blocks) == 8
    assert (blocks[0], blocks[-2:]) == (0, [45, 46])  # forced; token 2,999 is in block 46
    norms = [float(n) for n in re.findall(r": '([\d.e+-]+)'", text)]
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)
    # 186 = (3000 - 32) // 16 + 1 compressed keys, 8 blocks of 64, a window of 256
    assert f"{186 + 8 * 64 + 256:,} of     3,000" in text
    assert not any(tmp_path.iterdir())


def test_two_ranks(tmp_path):
    text = said(run(tmp_path, *TORCHRUN, 2, EXAMPLES / "two_ranks.py"))
    assert "rank 0 holds tokens 0..255, 768..1023" in text
    assert "rank 1 holds tokens 256..767" in text
    errors = [float(e) for e in re.findall(r"differ from one rank's by at most ([\d.e+-]+)", text)]
    assert len(errors) == 2
    assert max(errors) < 1e-10


def test_two_ranks_say_how_they_are_started(tmp_path):
    done = run(tmp_path, EXAMPLES / "two_ranks.py")
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2" in done.stderr


def test_gpt_model(tmp_path):
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", said(run(tmp_path, EXAMPLES / "gpt_model.py")))]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(5.55, abs=0.15)  # ln 256, at random
    assert losses[-1] < losses[0] - 1


# --- Megatron-LM ----------------------------------------------------------------------------------------------------


def test_arguments_of_megatron_lm_become_sizes():
    parser = pretrain_nsa().add_nsa_arguments(ArgumentParser())
    words = parser.format_help()
    for flag in ("--nsa-cmp-block-len", "--nsa-num-slc-blocks", "--nsa-shared-kv", "--nsa-compression"):
        assert flag in words
    args = parser.parse_args(["--nsa-window-len", "64", "--nsa-num-slc-blocks", "4"])
    assert pretrain_nsa().nsa_sizes(args) == NSAConfig(window_len=64, num_slc_blocks=4)
    assert pretrain_nsa().nsa_sizes(parser.parse_args([])) == NSAConfig()


def test_its_model_is_built_of_nsa_layers():
    (losses,) = run_ranks(1, loss_of_built_model)
    assert len(losses) == 256
    assert all(0 < loss < 20 for loss in losses)


def test_without_megatron_lm_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pretrain_gpt", None)  # as where there is none
    with pytest.raises(SystemExit, match="put its checkout first on PYTHONPATH"):
        pretrain_nsa().main()


@pytest.mark.slow
@pytest.mark.skipif(MEGATRON_LM is None, reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout runs this")
def test_stock_megatron_lm_trains_nsa_layers(tmp_path):
    """Two steps on the CPU; the two context-parallel ranks draw the weights that one rank draws."""
    one, two = (losses_of(tmp_path / str(cp), cp) for cp in (1, 2))
    assert len(one) == len(two) == 2
    assert one[0] == pytest.approx(5.55, abs=0.15)
    assert one[1] < one[0]
    assert two == pytest.approx(one, rel=1e-5)


def losses_of(folder: Path, cp_size: int) -> list[float]:
    """Of two steps of Megatron-LM; the second line has the mean of both."""
    folder.mkdir()
    on_cpu = Path(__file__).parent / "megatron_lm_on_cpu.py"
    script = EXAMPLES / "megatron_lm/pretrain_nsa.py"
    path = os.pathsep.join([MEGATRON_LM, os.environ.get("PYTHONPATH", "")])
    words = [*TORCHRUN, cp_size, on_cpu, script, *SMALL.split(), "--context-parallel-size", cp_size]
    text = said(run(folder, *words, PYTHONPATH=path, TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1"))
    return [float(x) for x in re.findall(r"lm loss: ([\d.E+-]+)", text)]


SMALL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 128 --swiglu --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 256
--max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3
--lr-decay-style constant --position-embedding-type none --calculate-per-token-loss --transformer-impl local
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --distributed-backend gloo --mock-data --split 90,10,0
--tokenizer-type NullTokenizer --vocab-size 255 --no-create-attention-mask-in-dataloader --num-workers 0
--log-interval 1 --eval-iters 1 --eval-interval 100 --nsa-num-slc-blocks 4 --nsa-window-len 64
"""
