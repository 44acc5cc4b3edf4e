"""Every example as it stands: its own process, from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.convert.megatron.weights import read_megatron
from nsa_dist.convert.nsa import converted
from nsa_dist.mcore import megatron_lm

EXAMPLES = Path(__file__).parents[2] / "examples"
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


def test_without_megatron_lm_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pretrain_gpt", None)  # as where there is none
    with pytest.raises(SystemExit, match="put its checkout first on PYTHONPATH"):
        megatron_lm.pretrain()


LAYOUTS = {
    "one": (1, ""),
    "TP2 with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "CP2": (2, "--context-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.slow
@pytest.mark.skipif(MEGATRON_LM is None, reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout runs this")
def test_stock_megatron_lm_trains_nsa_layers(tmp_path):
    """On the CPU: one checkpoint, and from it the same steps in every layout."""
    init = tmp_path / "init"
    train(tmp_path, 1, f"--train-iters 1 --lr 0 --min-lr 0 --save {init} --save-interval 1 --no-save-optim")
    found = {
        name: losses(train(tmp_path, ranks, f"{words} --load {init} --finetune --exit-on-missing-checkpoint"))
        for name, (ranks, words) in LAYOUTS.items()
    }
    one = found["one"]
    assert len(one) == STEPS
    assert one[0] == pytest.approx(5.55, abs=0.15)  # ln 256, at random
    assert one[-1] < one[0] - 0.1
    for name, got in found.items():
        assert got == pytest.approx(one, rel=1e-5), name
    hybrid = "--hybrid-layer-pattern" in (Path(MEGATRON_LM) / "megatron/training/arguments.py").read_text()
    for ranks, pattern in ((1, "*-*-"), (2, "*-|*-")) if hybrid else ():  # the GPT's weights, read as Megatron-LM does
        words = f"--pipeline-model-parallel-size {ranks} --hybrid-layer-pattern {pattern}"
        text = train(tmp_path, ranks, f"{words} --load {init} --finetune --exit-on-missing-checkpoint")
        assert losses(text) == pytest.approx(one, rel=1e-5), pattern


@pytest.mark.slow
@pytest.mark.skipif(MEGATRON_LM is None, reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout runs this")
def test_stock_megatron_lm_refuses_what_the_layers_would_not_do(tmp_path):
    done = start(tmp_path, 1, "--position-embedding-type none")
    assert done.returncode != 0
    assert "write --position-embedding-type rope" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(MEGATRON_LM is None, reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout runs this")
def test_checkpoints_of_stock_megatron_lm_convert(tmp_path):
    """Dense layers; saved by one process, and loaded and saved by two that share tensors, or layers."""
    script = Path(MEGATRON_LM) / "pretrain_gpt.py"
    dense = "--position-embedding-type rope --attention-dropout 0 --no-rope-fusion --train-iters 1 --lr 0 --min-lr 0"
    layouts = {"one": (1, ""), "TP2": (2, "--tensor-model-parallel-size 2"), "PP2": LAYOUTS["PP2"]}
    found = {}
    for name, (ranks, words) in layouts.items():
        load = "" if name == "one" else f"--load {tmp_path / 'one'} --finetune --exit-on-missing-checkpoint"
        save = f"--save {tmp_path / name} --save-interval 1"
        said(start(tmp_path, ranks, f"{dense} {words} {load} {save}", script, SMALL))
        found[name] = read_megatron(tmp_path / name, "bytes", 0)
    one = found["one"]
    assert (one.num_layers, one.num_kv_heads, one.vocab_size, len(one.weights)) == (2, 2, 256, 3 + 2 * 9)
    assert converted(one, NSAConfig())(torch.arange(200)).isfinite().all()
    for other in found.values():
        assert all(torch.equal(other.weights[name], x) for name, x in one.weights.items())


def start(
    folder: Path, ranks: int, words: str, script: Path = EXAMPLES / "megatron_lm/pretrain_nsa.py", size: str = ""
) -> subprocess.CompletedProcess:
    """Megatron-LM on the CPU; data of its own making, the same for every layout."""
    on_cpu = Path(__file__).parent / "megatron_lm_on_cpu.py"
    path = os.pathsep.join([MEGATRON_LM, os.environ.get("PYTHONPATH", "")])
    words = [*TORCHRUN, ranks, on_cpu, script, *(size or f"{SMALL} {NSA}").split(), *words.split()]
    return run(folder, *words, PYTHONPATH=path, TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")


def train(folder: Path, ranks: int, words: str) -> str:
    return said(start(folder, ranks, words))


def losses(text: str) -> list[float]:
    """Of every step; Megatron-LM's second line has the mean of the first two."""
    return [float(x) for x in re.findall(r"lm loss: ([\d.E+-]+)", text)]


STEPS = 5
SMALL = f"""
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 128 --swiglu --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --seq-length 256
--max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 2 --train-iters {STEPS} --lr 1e-3
--lr-decay-style constant --calculate-per-token-loss --transformer-impl local --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion
--distributed-backend gloo --mock-data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0
--ckpt-format torch_dist --log-interval 1 --eval-iters 1 --eval-interval 100
"""
NSA = "--nsa-num-slc-blocks 4 --nsa-window-len 64"
