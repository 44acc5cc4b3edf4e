"""What is said of a run's health: slow ranks, steps that are not finite, ends without a retry, full memory."""

import json
import re
import socket

import pytest
import torch

from launch_cases import Command, tiny, tiny_file
from nsa_dist.planner.shortage import shortage
from nsa_launch import exit_codes
from nsa_launch.console import Console
from nsa_launch.memory import shown
from nsa_launch.memory.among_ranks import shortage_said
from nsa_launch.memory.record import memory_of, out_of_memory_noted
from nsa_launch.run_folder import RunFolder, claimed

GIB = 2**30
TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    with claimed(tiny(tmp_path)) as folder:
        return folder


def said(tmp_path, folder: RunFolder, capsys, *records: dict) -> list[str]:
    with Console(tiny(tmp_path), folder) as console:
        with folder.output.metrics.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        console.update()
    return capsys.readouterr().out.splitlines()


def health(step: int, slowest: int, ratio: float) -> dict:
    work_s = [1.0, 1.0, 1.0]
    work_s[slowest] = ratio
    return {"kind": "health", "step": step, "work_s": work_s, "slowest_rank": slowest, "slowest_ratio": ratio}


def test_a_slow_rank_is_named_once(tmp_path, folder, capsys):
    records = [health(100, 1, 1.29), health(200, 2, 1.42), health(300, 2, 1.5), health(400, 0, 1.3)]
    where = "(waiting for others left out); topology.json says where it runs"
    assert said(tmp_path, folder, capsys, *records) == [
        f"rank 2 is slow: in step 200 it worked 1.42 s, 1.42 times the median of the ranks {where}",
        f"rank 0 is slow: in step 400 it worked 1.3 s, 1.30 times the median of the ranks {where}",
    ]


@pytest.mark.parametrize(
    ("action", "words"),
    [("skip", "left out"), ("rewind", "gone back to the last checkpoint for"), ("stop", "the end of the run")],
)
def test_a_step_that_is_not_finite_is_said(tmp_path, folder, capsys, action, words):
    record = {
        "kind": "not_finite", "step": 7, "samples": [24, 27], "loss": "nan", "grad_norm": "inf", "action": action,
    }  # fmt: skip
    assert said(tmp_path, folder, capsys, record) == [
        f"step 7 is not finite (loss nan, gradient norm inf, over samples 24 to 27): {words}"
    ]


def test_an_end_that_no_restart_would_change_is_said(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        console.finish({"step": 6, "stopped": False, "failure": "step 7 is not finite"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "the run ended, and starting it again as it is would not help: step 7 is not finite",
        "failed after step 6 of 24",
    ]


def test_a_rank_out_of_memory_writes_it_down_and_fails(folder):
    with pytest.raises(torch.OutOfMemoryError), out_of_memory_noted(folder, 3, torch.device("cpu")):
        raise torch.OutOfMemoryError(TEXT + "\n" * 3 + "x" * 10_000)
    (event,) = map(json.loads, folder.launches.read_text().splitlines())
    assert (event["event"], event["rank"]) == ("out_of_memory", 3)
    assert event["text"].startswith(TEXT)
    assert len(event["text"]) <= 400
    with pytest.raises(ValueError, match="other"), out_of_memory_noted(folder, 3, torch.device("cpu")):
        raise ValueError("other")
    assert len(folder.launches.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "is_full"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error in: a.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", True),
        ("NCCL error in: a.cpp:1, remote process exited or there was a network error", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory", False),
    ],
)
def test_a_gpu_is_full_in_the_words_of_all_who_use_it(folder, text, is_full):
    with pytest.raises(RuntimeError, match=re.escape(text)), out_of_memory_noted(folder, 3, torch.device("cpu")):
        raise RuntimeError(text)
    assert folder.launches.exists() == is_full


def test_without_a_launcher_the_first_rank_out_of_memory_says_it(tmp_path, folder, capsys):
    def fails(rank: int) -> str:
        noted = out_of_memory_noted(folder, rank, torch.device("cpu"))
        with pytest.raises(torch.OutOfMemoryError), shortage_said(tiny(tmp_path), folder, rank), noted:
            raise torch.OutOfMemoryError(TEXT)
        return capsys.readouterr().err

    for _attempt in range(2):
        folder.record("start", world_size=2, step=0)
        said = fails(1)
        assert f"rank 1 on {socket.gethostname()} ran out of memory: {TEXT}" in said
        assert "GiB of a rank" in said
        assert fails(0) == ""
    with Console(tiny(tmp_path), folder, ranks_speak=True) as console:
        folder.record("out_of_memory", rank=0, host="a", text=TEXT)
        folder.record("failure", ranks={"0": TEXT}, hung={})
        console.update()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu():
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    x = torch.zeros(GIB // 4, device=device)
    found = memory_of(device)
    assert x.nbytes <= found["peak_bytes"] <= found["reserved_bytes"] <= found["device_bytes"]
    assert 0 < found["outside_bytes"] <= found["device_bytes"] - x.nbytes


LARGE = {
    "hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32, "num_query_groups": 2, "head_dim": 128,
    "ffn_hidden_size": 14336,
}  # fmt: skip


def large(tmp_path, *words: str):
    model = [f"model.{name}={value}" for name, value in LARGE.items()]
    sizes = ["dtype=bf16", "sequence_length=262144", "num_slc_blocks=16", "window_len=512"]
    return tiny(tmp_path, *model, *sizes, "processes_per_node=8", "device=cuda", "global_batch_size=4", *words)


def full(**bytes_of: int) -> dict:
    return {"event": "out_of_memory", "rank": 3, "host": "b", "text": TEXT, **bytes_of}


def test_full_memory_is_shown_beside_the_plan_and_with_what_to_change(tmp_path):
    config = large(tmp_path)
    event = full(peak_bytes=78 * GIB, reserved_bytes=79 * GIB, device_bytes=80 * GIB)
    lines = shown.lines(config, event, 8)
    assert lines[0] == f"rank 3 on b ran out of memory: {TEXT}"
    table = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in lines}
    planned = shortage(config, 80 * GIB, 1, 8)
    assert table["weights"] == f"{planned.memory_bytes['weights'] / GIB:,.2f}"
    (total,) = [line.split()[-2:] for line in lines if "used: the peak" in line]
    assert total == [f"{planned.total_bytes / GIB:,.2f}", "78.00"]
    assert planned.total_bytes > 80 * GIB, "as it was"
    assert (table["held by torch at most"], table["the device has"]) == ("79.00", "80.00")
    remedies = [line for line in lines if line.startswith("  to make room: ")]
    assert 1 <= len(remedies) <= 4
    assert "model.recompute_attention=true" in " ".join(remedies) or "context_parallel_size=" in " ".join(remedies)


def test_remedies_need_less_than_the_run_and_those_that_fit_come_first(tmp_path):
    planned = shortage(large(tmp_path), 80 * GIB, 1, 8)
    assert planned.remedies
    assert all(remedy.total_bytes < planned.total_bytes for remedy in planned.remedies)
    fits = [remedy.fits for remedy in planned.remedies]
    assert fits == sorted(fits, reverse=True)
    assert any("parallel.context_parallel_size=8" in remedy.words for remedy in planned.remedies)


def test_a_remedy_is_words_of_the_command_line(tmp_path):
    for remedy in shortage(large(tmp_path), 80 * GIB, 1, 8).remedies:
        large(tmp_path, *remedy.words.split())  # accepted


def test_what_other_processes_hold_is_said_and_nothing_fits_there(tmp_path):
    bytes_of = {"peak_bytes": 2 * GIB, "reserved_bytes": 2 * GIB, "device_bytes": 1000 * GIB}
    alone = shown.lines(large(tmp_path), full(**bytes_of, outside_bytes=GIB), 8)
    assert not any("other processes" in line for line in alone)
    assert any(line.endswith(", which fits)") for line in alone)
    beside = shown.lines(large(tmp_path), full(**bytes_of, outside_bytes=998 * GIB), 8)
    assert any("other processes hold about 99" in line and "nvidia-smi on b" in line for line in beside)
    assert not any(line.endswith(", which fits)") for line in beside)


def test_what_is_not_known_is_not_made_up(tmp_path):
    lines = shown.lines(large(tmp_path), full(), 8)
    assert any(line.endswith("unknown") for line in lines)
    assert not any("the device has" in line or "fit" in line for line in lines)


def test_the_console_shows_it_once_an_attempt(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        folder.record("start", world_size=2, step=0)
        for rank in range(2):
            folder.record("out_of_memory", rank=rank, host="a", text=TEXT)
        console.update()
    out = capsys.readouterr().out
    assert out.count("ran out of memory") == 1
    assert "GiB of a rank" in out


@pytest.mark.slow
def test_a_run_that_is_not_finite_ends_with_a_message_and_is_not_tried_again(tmp_path):
    command = Command(tiny_file(tmp_path), tmp_path)
    words = ["lr=1e30", "min_lr=1e30", "clip_grad=0", "warmup_steps=0", "checkpoint_interval=1"]
    with command.started(*words) as launch:
        assert launch.wait(command.patience_s) == exit_codes.FAILED
    said = command.said()
    assert "is not finite (loss" in said
    assert "not_finite=stop; skip and rewind go on" in said
    assert len(command.events("start")) == 1
    assert not command.events("failure")
    assert len(command.events("gave up")) == 1
