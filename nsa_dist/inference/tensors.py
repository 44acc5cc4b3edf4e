"""The safetensors format, read and written: names and tensors in one file, nothing in it is executed.

    8 bytes     N, little-endian        N bytes     JSON {name: {dtype, shape, data_offsets: [begin, end]}}
    then        the tensors, C order, little-endian, one behind the other

The format is these lines, so the package of that name is not asked for: an exported folder is read with torch alone.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MOST_HEADER = 100_000_000  # bytes, as the package has it


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` in the order of their names."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, x in sorted(tensors.items()):
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in sorted(tensors.items()):
            file.write(
                x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, on the CPU. ValueError for a file that is cut, or none of this format."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 or not 2 <= size <= min(_MOST_HEADER, len(content) - 8):
            raise ValueError(f"its header is said to have {size} bytes, and the file has {len(content)}")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        return {name: _tensor(name, entry, memoryview(content)[8 + size :]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({type(error).__name__}: {error}); export the run again, or copy the "
            f"file again"
        ) from error


def _tensor(name: str, entry: dict[str, Any], data: memoryview) -> Tensor:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if min([0, *shape]) < 0 or not 0 <= begin <= end <= len(data) or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} is said to be bytes {begin} to {end} of {len(data)}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=torch.uint8).clone().view(dtype).view(shape)
