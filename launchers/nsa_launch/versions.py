"""The software of a process, by name: what a run was made with."""

import platform
from importlib import metadata

from nsa_dist import __version__

_NAMES = ("torch", "triton", "megatron-core", "ray", "numpy")


def versions() -> dict[str, str]:
    """Of what decides about numbers and about processes; what is not installed is left out."""
    found = {"nsa-dist": __version__, "python": platform.python_version()}
    for name in _NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
