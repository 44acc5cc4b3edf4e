"""`nsa-dist doctor`: what this machine has, and which path each part will take because of it."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.processes import Machine

_NEEDED = {
    "torch": "everything is written in it",
    "pydantic": "configuration files are checked with it",
    "megatron-core": "the model, the optimizer and the checkpoints are its",
    "psutil": "Megatron-core's checkpoints hang without it",
    "ray": "nsa-dist train starts its processes with it; torchrun works without",
    "rich": "the progress bar",
    "tensorboard": "curves in a browser",
    "matplotlib": "pictures after a run",
}
_SHARED_MEMORY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the report. `missing` says what to do about it, and is empty when all is well."""

    name: str
    detail: str
    missing: str = ""


def machine(with_gpus: bool = True) -> Machine:
    """The cores this process may use and the GPUs torch sees; seconds of imports less without those."""
    cores = len(os.sched_getaffinity(0))
    if not with_gpus:
        return Machine(cores, gpus=0)
    import torch

    return Machine(cores, gpus=torch.cuda.device_count())


def report() -> int:
    """Print every finding; exit code 1 when something that training needs is missing."""
    findings = [*_host(), *_packages(), *_gpus(), *_paths()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'MISSING' if finding.missing else 'ok':8}{finding.name:{width + 2}}{finding.detail}")
        if finding.missing:
            print(f"{'':8}{'':{width + 2}}-> {finding.missing}")
    num_missing = sum(bool(finding.missing) for finding in findings)
    print(
        f"\n{num_missing} things are missing" if num_missing else "\nready: make train, or nsa-dist train CONFIG.yaml"
    )
    return exit_codes.FAILED if num_missing else exit_codes.OK


def _host() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cores", f"{cores} of {os.cpu_count()} are ours: at most {cores} CPU ranks without sharing")
    yield Finding("memory", f"{memory_bytes / 2**30:.1f} GiB; two small CPU ranks and Ray take about 3")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        small = "give the container a larger one (docker run --shm-size=1g)" if free < _SHARED_MEMORY_BYTES else ""
        yield Finding("/dev/shm", f"{free / 2**30:.1f} GiB free, for Ray's objects and NCCL", small)


def _packages() -> Iterator[Finding]:
    for name, purpose in _NEEDED.items():
        found = _version(name)
        remedy = "" if found else f"{purpose}; pip install 'nsa-dist[ray]' (in a checkout: --editable '.[ray]') has it"
        yield Finding(name, found or "not installed", remedy)


def _gpus() -> Iterator[Finding]:
    if not _version("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("GPUs", f"none is visible ({built})")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if torch.cuda.device_count() > 1:
        yield Finding("links", "not measured: nsa-dist bench cp --gpus all --out DIR measures them, in 9 minutes")
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def _paths() -> Iterator[Finding]:
    """What the parts will use here."""
    on_gpu = bool(_version("torch")) and machine().gpus > 0
    if on_gpu:
        remedy = "" if _version("triton") else "the GPU kernels are written in it; pip install triton"
        yield Finding("attention", f"Triton {_version('triton') or 'not installed'} kernels (nsa_kernels)", remedy)
        yield Finding("ranks", "one GPU each, over NCCL")
        yield Finding("transport", _transport())
    else:
        yield Finding("attention", "PyTorch (nsa_kernels.cpu): the Triton kernels need a GPU")
        yield Finding("ranks", "CPU processes, over gloo")
    engine = _version("transformer-engine")
    yield Finding("layers", f"Transformer Engine {engine}" if engine else "Megatron-core's own (no Transformer Engine)")


def _transport() -> str:
    """Of context parallelism between the GPUs of this machine."""
    import torch

    from nsa_dist.cp.one_sided.choice import what_is_missing

    why = what_is_missing(range(torch.cuda.device_count()))
    return f"all_to_all, as {why}" if why else "one_sided: ranks on this machine read each other's pages"


def _version(package: str) -> str:
    """Installed version, or empty."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
