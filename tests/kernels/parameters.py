"""Whether a launch that lies ready (`nsa_kernels.common.direct`) has the parameters that were compiled."""

import re
from typing import Any

from nsa_kernels.common import direct
from nsa_kernels.common.launch import Launch

_BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8}
_BYTES |= {"u64": 8, "f32": 4, "f64": 8}
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,)\[]*(?:\[(\d+)\])?")
_NOTHING = direct.Driver(lambda *_: None, lambda *_: None, lambda *_: bytes(128))


def sizes_in(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel."""
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL).group(1)
    return [_BYTES[kind] * int(count or 1) for kind, count in _PARAMETER.findall(declared)]


def check_parameters(compiled: Any, kernel: Any, arguments: tuple, options: dict[str, Any]) -> None:
    """AssertionError unless a launch of `compiled` can lie ready, and its parameters are as large as the kernel's."""
    constants = tuple(options[parameter.name] for parameter in kernel.params[len(arguments) :])
    launch = Launch(None, 0, None, (1, 1, 1), constants, compiled)
    name = kernel.fn.__name__
    assert direct.takes(launch), f"{name}: {compiled.src.signature} with {compiled.metadata}"
    found = [x.size for x in direct.Ready(launch, arguments, _NOTHING).parameters]
    assert found == sizes_in(compiled.asm["ptx"]), name
