"""Whether a Ray answers, found out within seconds.

Ray itself waits for minutes for an address where nobody is, deaf to Ctrl-C. So a process of its own asks first: it can
be given up on, and what Ray writes meanwhile goes nowhere.
"""

import os
import select
import subprocess
import sys

from nsa_launch.on_ray.joining import tokens
from nsa_launch.on_ray.joining.address import Address

_CONNECT_S = 5.0  # a host that answers at all does so in much less
_ANSWER_S = 15.0
_IMPORT_S = 120.0  # of Ray, from a slow file system
_UNWELCOME = "wants another token"

# Its words: "ready" before it asks, then "yes" or why not.
_ASK = f"""
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), {_CONNECT_S}).close()
except OSError as error:
    print(error.strerror or error)
    sys.exit()
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
print("ready", flush=True)
try:
    GcsClient(address=f"{{sys.argv[1]}}:{{sys.argv[2]}}")
    print("yes")
except AuthenticationError:
    print({_UNWELCOME!r})
except Exception as error:
    print(" ".join(str(error).split())[:200])
"""


def check(address: Address) -> dict[str, str]:
    """The environment in which the Ray there takes us in. ConnectionError that says what is wrong, and what to do."""
    welcome = tokens.of_joined_ray()
    answer = _ask(address, welcome)
    if answer == "yes":
        return welcome
    if answer == _UNWELCOME:
        raise ConnectionError(f"the Ray at {address.text} ({address.origin}) asks for a token, and {tokens.remedy()}")
    raise ConnectionError(
        f"no Ray answers at {address.text} ({answer}), where {address.origin} says there is one; start it with "
        f"`ray start --head`, correct the address, or take launch.address=local to run on this machine alone"
    )


def _ask(address: Address, environment: dict[str, str]) -> str:
    with subprocess.Popen(
        [sys.executable, "-c", _ASK, address.host, str(address.port)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as asker:
        try:
            first = _line(asker, _IMPORT_S)
            return _line(asker, _ANSWER_S) if first == "ready" else first
        finally:
            asker.kill()


def _line(asker: "subprocess.Popen[bytes]", patience_s: float) -> str:
    assert asker.stdout is not None
    if not select.select([asker.stdout], [], [], patience_s)[0]:
        return f"not a word in {patience_s:g} s"
    return asker.stdout.readline().decode(errors="replace").strip() or "the question ended without an answer"
