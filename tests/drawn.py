"""Configurations drawn by seed, mutations of a valid one, and what comes of them: in the checks, and in training.

A mutation sets a key to something of another type, out of bounds, of another size, or nested; renames, drops or adds a
key; says it in the file or as a word; or damages the file's own text.
"""

import os
import random
import shutil
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import yaml

from launch_cases import TINY
from nsa_dist.train.refused import Refused
from nsa_launch import run_folder
from nsa_launch.config import RunConfig, load
from nsa_launch.on_ray import driver
from nsa_launch.processes import Machine, decide
from nsa_launch.ranks import rank
from nsa_launch.run_folder import claimed
from train_cases import StopAfter

KEYS = [(section, name) for section, field in RunConfig.model_fields.items() for name in field.annotation.model_fields]
INFINITE = float("inf")
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 4096, 2**31, 2**63, 2**64, 10**26, 1e-320, 1e-9, 0.5, 1.0, 1.5, 1e18, 1e308, INFINITE]
# No folder of anybody's: what is accepted makes a run there.
OTHERS = [
    None, True, False, "", " ", "null", "nan", "020", "1:30", "1_0", "0x10", "yes", "~", "~nosuch/x", "$HOME", "a\0b",
    "\ud800", "é" * 200, "x" * 5000, ".", "/dev/null", "/proc/self/x", "*", "**", "/etc/*", "[", "a #b", "a: b", [],
    [1], {}, {"a": 1}, {"a": None}, {"": "x"}, {"a=b": "x"}, [[[[]]]], {"a": {"b": {"c": 1}}},
]  # fmt: skip
WORDS = ["", "1", "[", "{", "]", "- a", "a: b", "*a", "&a 1", "!!int 1", "!x 1", "'", '"', "1 # c", "%", "@", "`", "|"]


def drawn(rng: random.Random, home: Path, place: Path | None = None) -> tuple[Path, list[str]]:
    """A file in `place`, or else `home`, and words: a valid configuration of a run there after 1 to 3 mutations."""
    raw: dict[Any, Any] = {section: dict(keys) for section, keys in TINY.items()}
    raw["run"]["output_dir"] = str(home / "run")
    raw["data"] = {"folder": str(home / "texts"), "pattern": "*.txt", "validation_fraction": 0.5}
    words: list[str] = []
    for _ in range(rng.randint(1, 3)):
        rng.choice([_near, _near, _near, _near, _drop, _drop, _set, _set, _word, _word, _rename, _add])(rng, raw, words)
    path = (place or home) / "drawn.yaml"
    text = yaml.dump(raw, allow_unicode=True).encode("utf-8", "surrogatepass")
    path.write_bytes(_damaged(rng, text) if rng.random() < 0.2 else text)
    return path, words


def _value(rng: random.Random) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.6 else rng.choice(OTHERS)


def _section(rng: random.Random, raw: dict) -> tuple[dict, str]:
    section, name = rng.choice(KEYS)
    if not isinstance(raw.get(section), dict):
        raw[section] = {}
    return raw[section], name


def _near(rng: random.Random, raw: dict, words: list[str]) -> None:
    """To what somebody may want who changes one thing."""
    keys, name = _section(rng, raw)
    value = keys.get(name)
    if isinstance(value, bool):
        keys[name] = not value
    elif isinstance(value, int | float):
        keys[name] = rng.choice([value * 2, value + 1, value // 2, float(value), str(value)])
    elif name not in keys and name != "resume":
        words.append(f"{name}={rng.choice([1, 2, 'true', 'null', 'a'])}")


def _set(rng: random.Random, raw: dict, words: list[str]) -> None:
    keys, name = _section(rng, raw)
    keys[name] = _value(rng)


def _word(rng: random.Random, raw: dict, words: list[str]) -> None:
    section, name = rng.choice(KEYS)
    dotted = f"{section}.{name}"
    key = rng.choice([name, dotted, dotted, f"{dotted}.a", f"{dotted}x", "a.b.c"])
    words.append(f"{key}={rng.choice(WORDS) if rng.random() < 0.4 else _value(rng)}")


def _rename(rng: random.Random, raw: dict, words: list[str]) -> None:
    keys, name = _section(rng, raw)
    keys[rng.choice([name + "s", name[1:], name.upper(), 1, None, True, 1.5, "", "x" * 2000])] = keys.pop(name, 1)


def _drop(rng: random.Random, raw: dict, words: list[str]) -> None:
    keys, name = _section(rng, raw)
    keys.pop(name, None)
    if rng.random() < 0.2:
        raw[rng.choice(list(raw))] = _value(rng)


def _add(rng: random.Random, raw: dict, words: list[str]) -> None:
    keys, _ = _section(rng, raw)
    junk: Any = _value(rng)
    for _ in range(rng.choice([1, 3, 40])):
        junk = rng.choice([[junk], {"k": junk}, [junk, junk]])
    keys[rng.choice(["junk", *keys])] = junk


def _damaged(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    kind = rng.choice(["bit", "cut", "zeroes", "twice", "brackets"])
    if kind == "bit":
        return text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]
    return {
        "cut": text[:at],
        "zeroes": text[:at] + bytes(64) + text[at + 64 :],
        "twice": text + text[at:],
        "brackets": text[:at] + b"[" * 2000 + text[at:],
    }[kind]


def checked(path: Path, words: list[str]) -> str:
    """All that the command does before Ray: "accepted", or the message of the refusal. Any other exception gets out."""
    try:
        config = load(path, words)
        driver.plan(config, Machine(cores=64, gpus=0))
        with claimed(config):
            return "accepted"
    except Refused as refusal:
        return str(refusal)


class Outcome(NamedTuple):
    """Of one accepted configuration that was really run."""

    end: str  # "trained", why the run ended before its time, or what was raised
    steps: int


def is_small(config: RunConfig) -> bool:
    """Seconds to train a step of, on two cores."""
    run, model = config.run, config.model
    tokens = run.sequence_length * (run.global_batch_size + run.eval_batches)
    experts = (model.num_experts or 0) * model.expert_hidden_size + (model.moe_shared_expert_intermediate_size or 0)
    width = max(model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.head_dim, experts)
    return config.world_size <= 2 and (model.num_layers + model.num_mtp_layers) * tokens * width <= 2**24


def accepted_and_small(home: Path, seeds: Iterable[int], number: int) -> list[int]:
    """The first `number` of `seeds` whose configurations are accepted, are small, and train otherwise than others."""
    found: dict[str, int] = {}
    for seed in seeds:
        path, words = drawn(random.Random(seed), home)
        try:
            config = load(path, words)
            driver.plan(config, Machine(cores=64, gpus=0))
            run_folder.check(config)
        except Refused:
            continue
        if is_small(config):
            found.setdefault(config.model_dump_json(exclude={"launch"}), seed)
        if len(found) == number:
            break
    return list(found.values())


def world_size_of(home: Path, seed: int) -> int:
    return load(*drawn(random.Random(seed), home)).world_size


def train_drawn(rank_here: int, home: Path, seeds: Sequence[int]) -> list[Outcome]:
    """On every rank of a group of their world size: two steps of each, in the folder that it names."""
    os.chdir(home)
    outcomes = []
    for seed in seeds:
        own = home / f"rank {rank_here}"  # of the files that are drawn
        own.mkdir(exist_ok=True)
        path, words = drawn(random.Random(seed), home, own)
        config = load(path, words)
        with ExitStack() as stack:
            if rank_here == 0:
                stack.enter_context(claimed(config))
            dist.barrier()
            end, steps = _trained(config)
            dist.barrier()
        if rank_here == 0:
            shutil.rmtree(config.run.output_dir)
        outcomes.append(Outcome(end, steps))
        dist.barrier()
    return outcomes


def _trained(config: RunConfig) -> tuple[str, int]:
    processes = decide(config, 0)
    try:
        result = rank.run(config, processes, StopAfter(2), node="here", nvlink_domain="here")
    except Refused as refusal:
        return f"refused: {refusal}", 0
    except Exception as error:
        return "".join(traceback.format_exception(error)), 0
    return result.failure or "trained", result.step
