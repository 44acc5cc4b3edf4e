"""A `torch_dist` checkpoint of Megatron's, read by one process and without Megatron: nothing in it is executed.

.metadata           a pickle of torch.distributed.checkpoint: name, shape and dtype of each tensor, and where its
                    pieces lie. Read with the classes of that format alone; any other name in it is refused.
__N_M.distcp        the pieces, each as torch.save writes them. Read with weights_only=True.
common.pt           what is no tensor, the arguments of the run among them; from Megatron-core 0.19 on it lies among
                    the pieces, as `common_state`. Read with weights_only=True, and names that this does not know
                    (Megatron's enumerations, a signal's) stand for nothing: they are neither imported nor called.
"""

import io
import pickle
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

T = TypeVar("T")
_METADATA, _COMMON, _LATEST = ".metadata", "common.pt", "latest_checkpointed_iteration.txt"
_COMMON_STATE = "common_state/shard_0_1"
_FORMAT = {
    "torch.distributed.checkpoint.metadata": "Metadata StorageMeta TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties MetadataIndex _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size " + " ".join(name for name, x in vars(torch).items() if isinstance(x, torch.dtype)),
}
_KNOWN = {f"{module}.{name}" for module, names in _FORMAT.items() for name in names.split()}
_PATHS = {"pathlib.PosixPath", "pathlib._local.PosixPath"}  # where it was saved, which nobody asks


class Checkpoint(NamedTuple):
    """One iteration's folder, and what its `.metadata` says."""

    folder: Path
    metadata: Metadata

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """By name, with size and dtype."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: each for name, each in entries if isinstance(each, TensorStorageMetadata)}

    @property
    def objects(self) -> set[str]:
        """Names of what is stored beside tensors."""
        return self.metadata.state_dict_metadata.keys() - self.tensors.keys()


def is_megatron(folder: Path) -> bool:
    """Whether `folder` looks like what Megatron-LM saves into, or like one iteration in there."""
    return any((folder / name).is_file() for name in (_LATEST, _METADATA, _COMMON))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Of one iteration's folder, or of the latest one in what `--save` named.

    ValueError for what is missing or of another format, and for a `.metadata` that names anything but its own classes.
    """
    place = _iteration(folder)
    if not (place / _METADATA).is_file():
        raise ValueError(
            f"{place} has no {_METADATA}, which says where each tensor of a torch_dist checkpoint lies: Megatron-LM "
            f"saves other formats without it; load it with Megatron-LM and --ckpt-convert-format torch_dist "
            f"--ckpt-convert-save DIR, or copy the folder as a whole, hidden files too"
        )
    with (place / _METADATA).open("rb") as file:
        metadata = _read(place / _METADATA, lambda: _OfTheFormat(file).load())
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(
            f"{place / _METADATA} says where nothing lies, so no tensor can be found; copy the folder again"
        )
    return Checkpoint(place, metadata)


def read_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """What Megatron-LM saved of its command line, `args`, by name. ValueError for a file without, or cut."""
    path = checkpoint.folder / _COMMON
    content = path.read_bytes() if path.is_file() else _bytes_of(checkpoint, _COMMON_STATE)
    common = _read(path, lambda: _load_inert(content)) if content else {}
    if isinstance(common, list) and len(common) == 1:  # Megatron-core 0.19's
        common = common[0]
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, _Inert | Namespace) or not vars(arguments):
        raise ValueError(
            f"{checkpoint.folder} holds no args, neither in {_COMMON} nor as common_state, and they have the sizes of "
            f"the model; give a checkpoint that Megatron-LM's own training saved"
        )
    return dict(vars(arguments))


def read_weights(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Tensor]:
    """These tensors as a whole, on the CPU. ValueError for pieces that are missing or cut."""
    _check_pieces(checkpoint, names)
    entries = checkpoint.tensors
    found = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
    reader = _Reader(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        _read(checkpoint.folder, lambda: dcp.load(found, storage_reader=reader, no_dist=True))
    return found


def _iteration(folder: Path) -> Path:
    if not (folder / _LATEST).is_file():
        return folder
    latest = (folder / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    name = f"iter_{int(latest):07d}" if latest.isascii() and latest.isdigit() else latest
    if not (folder / name).is_dir():
        raise ValueError(
            f"{folder / _LATEST} says {latest!r}, and {folder} has no such iteration; name the folder of one that is "
            f"there, such as {folder / 'iter_0000100'}"
        )
    return folder / name


def _check_pieces(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """The pieces make up the whole, and the files hold them: what is not written would be whatever memory holds."""
    for name in names:
        entry = checkpoint.tensors[name]
        covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if covered != entry.size.numel():
            raise ValueError(
                f"{checkpoint.folder / _METADATA} has pieces of {name} with {covered} numbers together, and {name} has "
                f"{entry.size.numel()}, so a part of it would be unknown; copy the folder again, or take another "
                f"iteration"
            )
    for index, info in checkpoint.metadata.storage_data.items():
        path = checkpoint.folder / info.relative_path
        if index.fqn in names and (not path.is_file() or path.stat().st_size < info.offset + info.length):
            raise ValueError(
                f"{path} is missing or cut, and {index.fqn} lies in it; copy the folder again, all files of it, or "
                f"take another iteration"
            )


def _bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    """Of an object, or none where there is no such object."""
    for index, info in checkpoint.metadata.storage_data.items():
        if index.fqn == name:
            path = checkpoint.folder / info.relative_path
            content = path.read_bytes()[info.offset : info.offset + info.length] if path.is_file() else b""
            if len(content) == info.length:
                return content
            raise ValueError(f"{path} is missing or cut, and the arguments lie in it; copy the folder again")
    return b""


class _Reader(dcp.FileSystemReader):
    """Of a checkpoint whose `.metadata` was read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.folder)
        self._metadata = checkpoint.metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _OfTheFormat(pickle.Unpickler):
    """Makes objects of the classes of torch.distributed.checkpoint alone."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PATHS:
            return PurePosixPath
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no class of this format, and whatever it is would be called"
            )
        return super().find_class(module, name)


class _Inert:
    """In the place of what a file names: takes what it is given, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def _load_inert(content: bytes) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    inert: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (type("_Inert", (_Inert,), {}), name) for name in names
    ]
    with torch.serialization.safe_globals(inert):
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text speaks of a way to load it after all
            raise pickle.UnpicklingError("it holds more than arguments, and would call what it names") from error


def _read(path: Path, read: Callable[[], T]) -> T:
    """ValueError for whatever torch or pickle say of a file that is cut, or none of the format."""
    try:
        return read()
    except (Exception, CheckpointException) as error:  # what torch raises for a cut file is no narrower
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as a torch_dist checkpoint ({type(error).__name__}: {reason[-1]}), so its weights "
            f"are unknown; copy the folder again, or take another iteration"
        ) from error
