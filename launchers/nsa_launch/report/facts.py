"""What a run's folder says of it. Nothing in it is an authority, and any of its files may be missing or spoiled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nsa_dist.train.config_errors import is_secret
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.files.records import MetricsFollower, by_kind
from nsa_dist.train.refused import Refused
from nsa_launch.run_folder import RunFolder

_MASK = "(kept out of this file)"


@dataclass(frozen=True)
class Facts:
    """Plain data of one run. `records` are those of `metrics.jsonl`, by kind, each step once and in order."""

    folder: RunFolder
    marker: RunMarker
    records: Mapping[str, list[dict[str, Any]]]
    events: list[dict[str, Any]]
    config: Any  # of config.yaml, secrets masked; None if it cannot be read
    ranks: list[dict[str, Any]]
    skipped: Mapping[str, int]  # lines that are no records, by file

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == kind]

    @property
    def steps_wanted(self) -> int | None:
        """Of the configuration."""
        run = self.config.get("run") if isinstance(self.config, dict) else None
        steps = run.get("steps") if isinstance(run, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def attention(self) -> str | list[str]:
        """As `model.attention` has it; runs from before that key have NSA in every layer."""
        model = self.config.get("model") if isinstance(self.config, dict) else None
        return model.get("attention", "nsa") if isinstance(model, dict) else "nsa"

    @property
    def loss_unit(self) -> str:
        data = self.config.get("data") if isinstance(self.config, dict) else None
        return "nats per token" if isinstance(data, dict) and data.get("tokens") else "nats per byte"

    @property
    def last_step(self) -> int:
        """The last that was recorded."""
        return max((record["step"] for record in self.records.get("train", ())), default=0)

    @property
    def versions(self) -> dict[str, str]:
        """Of the software of the last start that wrote them down."""
        found = [event["versions"] for event in self.events_of("start") if isinstance(event.get("versions"), dict)]
        return found[-1] if found else {}


def read(folder: RunFolder) -> Facts:
    """Refused where there is no run."""
    marker = RunMarker.read(folder.path)
    if marker is None:
        raise Refused(
            f"{folder.path} has no run.json, so it is not the folder of a run; name a run's output_dir, the folder in "
            f"which its metrics.jsonl lies"
        )
    metrics, launches = MetricsFollower(folder.output.metrics), MetricsFollower(folder.launches)
    records, events = by_kind(metrics.poll()), launches.poll()
    skipped = {folder.output.metrics.name: metrics.num_skipped, folder.launches.name: launches.num_skipped}
    config, ranks = _config(folder.path / "config.yaml"), _ranks(folder.topology)
    return Facts(folder, marker, records, events, config, ranks, skipped)


def _config(path: Path) -> Any:
    try:
        return masked(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def masked(value: Any) -> Any:
    """`value` without what stands under the name of a secret: it should not be there, and this page is passed on."""
    if isinstance(value, dict):
        return {k: _MASK if v is not None and is_secret(str(k)) else masked(v) for k, v in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


def _ranks(path: Path) -> list[dict[str, Any]]:
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [rank for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a record by their path, `layers/1/gate`; lists go by their index. Without `step`."""
    found: dict[str, float] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{path}/{name}" if path else str(name), inner)
        elif isinstance(value, list):
            walk(path, {str(i): inner for i, inner in enumerate(value)})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = float(value)

    walk("", {name: value for name, value in record.items() if name not in ("kind", "step")})
    return found
