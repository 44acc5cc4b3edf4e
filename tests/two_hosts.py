"""Two hosts on one machine, as far as the kernel can pretend: names, processes, network and memory of their own.

Each is a process in namespaces of its own, joined to the other by one cable (a veth pair) that can be pulled. Files are
shared, as between nodes of a cluster. Needs root and util-linux; `missing()` says what is not there.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PREFIX = "10.77.0."
# What processes of one machine share otherwise: its name, its memory, and the folder where Ray keeps its sockets and
# the address of the last cluster.
_READY = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray {home}/ray
mount --bind {home}/ray /tmp/ray
ip link set lo up
ip addr add {address}/32 dev lo  # its own also while no cable is in
exec {python} -c '{init}'
"""
# The first process of a host. What nobody waits for becomes its child, and must leave no zombie: to Ray that is alive.
_INIT = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
"""


def missing() -> str:
    """Why two hosts cannot be made here; empty if they can."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    made = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, text=True)
    if made.returncode:
        return f"namespaces cannot be made: {made.stderr.strip()}"
    name = f"vt{os.getpid()}"
    made = subprocess.run(["ip", "link", "add", name, "type", "veth"], capture_output=True, text=True)
    if made.returncode:
        return f"a veth pair cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "link", "del", name], check=True)
    return ""


_NAMESPACES = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


@dataclass
class Host:
    """One of the two. `address` is its only one beside localhost."""

    name: str
    address: str
    cable: str  # its end
    home: Path
    pid: int = 0  # of its first process, here
    children: list[subprocess.Popen] = field(default_factory=list)
    _keeper: subprocess.Popen | None = None

    def boot(self, hosts: Path) -> None:
        script = _READY.format(
            name=self.name, hosts=hosts, home=self.home, address=self.address, python=sys.executable, init=_INIT
        )
        self._keeper = subprocess.Popen(
            ["unshare", *_NAMESPACES, "sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n"
        (first,) = psutil.Process(self._keeper.pid).children()
        self.pid = first.pid

    def plug_in(self) -> None:
        """Give the end of the cable, which is in this host already, its address."""
        for words in (["addr", "add", f"{self.address}/24", "dev", self.cable], ["link", "set", self.cable, "up"]):
            self.run(["ip", *words])

    def set_link(self, state: str) -> None:
        """ "down" pulls the cable, "up" puts it back."""
        self.run(["ip", "link", "set", self.cable, state])

    def inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", "--wd=/tmp", "--", *command]

    def run(self, command: Sequence[str]) -> None:
        subprocess.run(self.inside(command), check=True, capture_output=True, env=self.environment)

    def start(self, command: Sequence[str], output: Path) -> subprocess.Popen:
        """A process on this host, what it prints in `output`."""
        with output.open("a") as file:
            started = subprocess.Popen(
                self.inside(command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self.children.append(started)
        return started

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "MASTER_"))}
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "RAY_TMPDIR": "/tmp",
        }  # a socket's path is short
        return {**kept, **own, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}

    def lose(self) -> None:
        """Power off: its first process dies, and the kernel kills all the others."""
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
            self._keeper = None
        for child in self.children:
            child.wait()
        self.children.clear()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Both, connected; all that ran on them is gone afterwards."""
    with _booted(folder, "host-a", "host-b") as (first, second):
        connect(first, second)
        yield first, second


@contextmanager
def one_host(folder: Path) -> Iterator[Host]:
    """Alone, without a cable."""
    with _booted(folder, "host-a") as (host,):
        yield host


@contextmanager
def _booted(folder: Path, *names: str) -> Iterator[list[Host]]:
    addresses = {name: f"{PREFIX}{number}" for number, name in enumerate(names, start=1)}
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    made = [Host(name, address, f"v{os.getpid()}{name[-1]}", folder / name) for name, address in addresses.items()]
    with ExitStack() as stack:
        for host in made:
            (host.home / "tmp").mkdir(parents=True)
            host.boot(hosts)
            stack.callback(host.lose)
        yield made


def connect(first: Host, second: Host) -> None:
    """A new cable; an end goes when its host does."""
    subprocess.run(["ip", "link", "add", first.cable, "type", "veth", "peer", "name", second.cable], check=True)
    for host in (first, second):
        subprocess.run(["ip", "link", "set", host.cable, "netns", str(host.pid)], check=True)
        host.plug_in()


def wait_for(
    what: str, happened: Callable[[], object], running: subprocess.Popen | None, said: Path, patience_s: float = 600
) -> None:
    """Look again and again; `running` must not end before."""
    deadline = time.monotonic() + patience_s
    while not happened():
        if running is not None:
            assert running.poll() is None, f"exit code {running.returncode}, waiting for {what}:\n{said.read_text()}"
        assert time.monotonic() < deadline, f"{what} never came:\n{said.read_text()}"
        time.sleep(0.1)  # between two looks
