"""Ray's job server, asked in seconds and refused in one message."""

import logging
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from nsa_dist.train.refused import Refused
from nsa_launch.on_ray.joining import tokens

_CONNECT_S = 5.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to what it is given


def connected(address: str | None) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of the dashboard at `address`. ValueError where there is none."""
    url, origin = _url(address)
    _check_listens(url, origin)
    for name in _ADDRESSES:
        os.environ.pop(name, None)
    os.environ.update(tokens.of_joined_ray())
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except (ConnectionError, RuntimeError) as error:
        raise Refused(f"the Ray dashboard at {url} ({origin}) does not take us: {_why(error)}") from None


def _url(address: str | None) -> tuple[str, str]:
    if address:
        url, origin = address, f"--address {address}"
    else:
        found = [(name, os.environ[name]) for name in _ADDRESSES if os.environ.get(name, "").startswith("http")]
        if not found:
            raise Refused(
                "no cluster is named, and jobs go to one's dashboard; give --address http://HEAD:8265, or export "
                "RAY_API_SERVER_ADDRESS=http://HEAD:8265"
            )
        (name, url), *_ = found
        origin = f"{name}={url} of the environment"
    if not urlsplit(url).scheme.startswith("http") or not urlsplit(url).hostname:
        raise Refused(
            f"{origin} is not the address of a dashboard, where jobs are submitted; give --address http://HEAD:8265"
        )
    return url, origin


def _check_listens(url: str, origin: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), _CONNECT_S).close()
    except OSError as error:
        raise Refused(
            f"nobody answers at {url} ({origin}): {error.strerror or error}; start Ray there with `ray start --head "
            f"--dashboard-host=0.0.0.0`, or reach it with `kubectl port-forward` or ssh -L, and give that address"
        ) from None


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "401" in text or "403" in text or "oken" in text:
        return f"it asks for a token, and {tokens.remedy()}"
    if "ray[default]" in text:
        return "this machine lacks ray[default]; pip install 'ray[default]'"
    return text[:300]
