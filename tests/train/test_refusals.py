"""What of process 0 reaches the others: a refusal as a refusal, any other failure as one, and nobody waits."""

import pytest
import torch
import torch.distributed as dist

from nsa_dist.cp.comm import Comm
from nsa_dist.train.data.batches import _opened, build_datasets
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from nsa_dist.train.world import World
from ranks import run_ranks
from train_cases import small_config, write_texts

RAISED = {"refused": Refused("take another"), "value": ValueError("offset"), "system": OSError(28, "No space left")}


def told(rank: int) -> dict[str, str]:
    """The exception of each kind as this rank sees it."""
    comm = Comm(dist.group.WORLD)
    world = World(torch.device("cpu"), rank, dist.get_world_size(), rank, dist.get_world_size(), comm)
    seen = {}
    for name, error in RAISED.items():

        def failing(error=error):
            raise error

        try:
            world.agreed(failing)
        except Exception as caught:
            seen[name] = f"{type(caught).__name__}: {caught}"
    seen["agreed"] = world.agreed(lambda: "a value")
    return seen


def test_only_a_refusal_is_one_on_every_process():
    first, second = run_ranks(2, told)
    assert first == {
        "refused": "Refused: take another",
        "value": "ValueError: offset",
        "system": "OSError: [Errno 28] No space left",
        "agreed": "a value",
    }
    assert second == {
        "refused": "Refused: take another",
        "value": "RuntimeError: process 0 failed: ValueError: offset",
        "system": "RuntimeError: process 0 failed: OSError: [Errno 28] No space left",
        "agreed": "a value",
    }


@pytest.fixture
def packed(tmp_path):
    config = small_config(tmp_path, "run", data={"folder": write_texts(tmp_path / "texts")})
    output = OutputDir(config.run.output_dir)
    prepare_output(config)
    write_corpus(config.data, output.data)
    return config, output


@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
def test_a_truncated_file_of_tokens_is_a_failure_that_names_it(packed, kept):
    _, output = packed
    path = output.data / "train.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(kept * size))
    with pytest.raises(RuntimeError, match=rf"train\.bin has \d+ bytes, and .*train\.idx lists {size}.*packed again"):
        _opened(output.data / "train")


def test_texts_shorter_than_a_sequence_are_refused_when_they_are_packed(tmp_path):
    """Their sizes do not say it: half of them are the same, and some are for validation."""
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}").write_text(100 * "ab"[i % 2])
    config = small_config(tmp_path, "run")
    prepare_output(config)

    class Alone:
        def agreed(self, work):
            return work()

    with pytest.raises(Refused, match=r"sequence_length=256 is more than the 101 tokens .*or more texts"):
        build_datasets(config, OutputDir(config.run.output_dir), Alone())
