"""Where Ray is to be joined, and who said so."""

import os
from dataclasses import dataclass

from nsa_dist.train.refused import Refused

_AUTO = "auto"


@dataclass(frozen=True)
class Address:
    """`HOST:PORT` of a cluster's head."""

    text: str
    origin: str  # the setting it comes from, for messages

    @property
    def host(self) -> str:
        return self.text.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.text.rpartition(":")[2])


def find(configured: str) -> Address | None:
    """Of the cluster to join, or None to start a Ray of one's own; `configured` is `launch.address`.

    `ray job submit` sets RAY_ADDRESS for the command that it starts. ValueError for what names no head.
    """
    if configured == "local":
        return None
    named = os.environ.get("RAY_ADDRESS", "") if configured == _AUTO else configured
    if named in ("", "local"):
        return None
    origin = f"RAY_ADDRESS={named} of the environment" if configured == _AUTO else f"launch.address={named}"
    address = Address(_of_this_machine(origin) if named == _AUTO else named, origin)
    _check(address)
    return address


def _of_this_machine(origin: str) -> str:
    """What Ray itself takes `auto` for: the cluster that was started last on this machine."""
    from ray._private.utils import read_ray_address

    found = read_ray_address()
    if not found:
        raise Refused(
            f"{origin} means the Ray of this machine, and none has been started here; start one with "
            f"`ray start --head`, or unset RAY_ADDRESS to let the run start its own"
        )
    return found


def _check(address: Address) -> None:
    if address.text.startswith("ray://"):
        raise Refused(
            f"{address.origin} is a Ray Client, and the run would end with its connection; submit the command to the "
            f"cluster instead: nsa-dist submit CONFIG.yaml --address http://HEAD:8265"
        )
    if address.text.startswith(("http://", "https://")):
        raise Refused(
            f"{address.origin} is a dashboard, where jobs are submitted, and a run joins Ray itself; give "
            f"launch.address=HOST:6379, or submit it there: nsa-dist submit CONFIG.yaml --address {address.text}"
        )
    host, _, port = address.text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise Refused(
            f"{address.origin} is not HOST:PORT of a cluster's head; give the address that `ray start --head` printed, "
            f"such as launch.address=10.0.0.1:6379"
        )
