"""What may happen to a run on several GPUs, over NCCL: a rank killed, a rank that hangs, a card that is full."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from launch_cases import Command, tiny_file
from nsa_launch import exit_codes
from nsa_launch.run_folder import RunFolder

STEPS, INTERVAL = 300, 25  # steps of some milliseconds, which are hit before the run is over
TIMEOUT_S = 40.5  # the first checkpoint of four runs at once has taken 16 s
ON_GPUS = (f"steps={STEPS}", f"checkpoint_interval={INTERVAL}", "device=cuda")
LEFT_BYTES = 3 << 30  # of the full card: enough to start on, not for a step of this:
LARGE = (
    "sequence_length=65536", "num_layers=4", "hidden_size=1024", "ffn_hidden_size=8192",
    "num_attention_heads=16", "head_dim=64",
)  # fmt: skip


def started(command: Command, launcher: str, restarts: int, *words: str) -> AbstractContextManager[Popen]:
    """The running command, through Ray or torchrun, both of which start lost ranks again so many times."""
    words = (*ON_GPUS, f"process_group_timeout_s={TIMEOUT_S}", *words)
    if launcher == "torchrun":
        return command.torchrun_started(restarts, *words)
    return command.started(*words, f"max_failures={restarts}")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def losses(command: Command) -> dict[int, float]:
    """By step; those made twice are the same to the bit."""
    found: dict[int, float] = {}
    for record in command.train_records():
        assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    home = tmp_path_factory.mktemp("undisturbed")
    command = Command(tiny_file(home), home)
    command.torchrun(*ON_GPUS)
    return losses(command)


@pytest.fixture
def command(tmp_path) -> Command:
    return Command(tiny_file(tmp_path), tmp_path)


def hit(command: Command, home: Path, rank: int, number: signal.Signals) -> int:
    """A signal to the process of a rank, once a step behind a checkpoint was made; the process."""
    command.wait_until(lambda: command.last_step() >= INTERVAL + 2)
    pid = json.loads(RunFolder(home / "run").topology.read_text())[rank]["pid"]
    os.kill(pid, number)
    return pid


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_killed_rank_is_made_good(command, tmp_path, undisturbed, launcher):
    with started(command, launcher, 1) as launch:
        hit(command, tmp_path, 1, signal.SIGKILL)
        command.wait_until(lambda: len(command.events("start")) == 2)
        assert launch.wait(command.patience_s) == 0, command.said()
    assert command.events("start")[1]["step"] >= INTERVAL, "the last checkpoint"
    assert losses(command) == undisturbed


@pytest.mark.parametrize(("launcher", "rank"), [("ray", 1), ("torchrun", 0)])
def test_a_stopped_rank_is_said_named_and_made_good(command, tmp_path, undisturbed, launcher, rank):
    with started(command, launcher, 1) as launch:
        hung = hit(command, tmp_path, rank, signal.SIGSTOP)
        try:
            command.wait_until(lambda: bool(command.events("standstill")))
            command.wait_until(lambda: len(command.events("start")) == 2)
            assert launch.wait(command.patience_s) == 0, command.said()
        finally:
            with suppress(ProcessLookupError):
                os.kill(hung, signal.SIGKILL)
    (failure,) = command.events("failure")
    assert list(failure["hung"]) == [str(rank)]
    assert f"its process {hung} has given no sign" in failure["hung"][str(rank)]
    assert f"rank {rank} {failure['hung'][str(rank)]}" in command.said()
    assert losses(command) == undisturbed


@pytest.fixture
def fill() -> Iterator[Callable[[int], None]]:
    """Takes all memory of a card but LEFT_BYTES until the test ends."""
    held = []

    def take(card: int) -> None:
        free = torch.cuda.mem_get_info(card)[0]
        held.append(torch.empty(free - LEFT_BYTES, dtype=torch.uint8, device=f"cuda:{card}"))

    yield take
    held.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_full_card_is_said_beside_the_plan_with_what_to_change(command, fill, launcher):
    fill(1)
    with started(command, launcher, 0, *LARGE) as launch:
        assert launch.wait(command.patience_s) == exit_codes.FAILED, command.said()
    assert {event["rank"] for event in command.events("out_of_memory")} == {1}
    said = command.said()
    assert "rank 1 on " in said
    assert "out of memory" in said.partition("ran out of memory: ")[2].splitlines()[0]
    assert "used: the peak" in said
    assert "other processes hold about 1" in said
    assert "  to make room: " in said
