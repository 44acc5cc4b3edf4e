"""Train through Ray: start or join it, start the ranks, show their progress, stop them on a signal."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nsa_launch import exit_codes
from nsa_launch.config import RunConfig
from nsa_launch.console import Console
from nsa_launch.on_ray import environment, session
from nsa_launch.on_ray.room import Room
from nsa_launch.processes import Machine, Processes, check_groups, check_machine, decide
from nsa_launch.run_folder import RunFolder
from nsa_launch.stop_signals import StopSignals

_RELAUNCHES = 2  # Ray Train restarts lost ranks, but nobody restarts its controller: we do
_POLL_S = 0.2


@dataclass(frozen=True)
class Plan:
    """What was settled before anything started. With an address, the cluster there decides about `processes`."""

    config: RunConfig
    address: str | None
    processes: Processes | None


def plan(config: RunConfig, machine: Machine) -> Plan:
    """ValueError on everything that can be refused without Ray."""
    check_groups(config)
    address = environment.cluster_address(config.launch.address)
    if address is not None:
        session.check_address(address)
        return Plan(config, address, None)
    processes = decide(config, machine.gpus)
    check_machine(processes, machine)
    return Plan(config, None, processes)


def run(plan: Plan, folder: RunFolder) -> int:
    """Train and return the exit code (`nsa_launch.exit_codes`)."""
    settings = environment.ray_settings(plan.config)
    environment.prepare_driver(settings)
    with Console(plan.config, folder) as console, StopSignals(_asker(folder, console)) as signals, ExitStack() as ray:
        try:
            processes = _enter_ray(plan, settings, console, ray)
        except (ConnectionError, ValueError) as refusal:
            console.say(str(refusal))
            return exit_codes.BAD_CONFIG
        signals.install()  # ray.init took SIGTERM over
        return Launch(plan.config, processes, folder, console, signals).run()


def _enter_ray(plan: Plan, settings: Mapping[str, str], console: Console, stack: ExitStack) -> Processes:
    if plan.address is not None:
        console.say(f"joining Ray at {plan.address}")
        stack.enter_context(session.joined(plan.address, settings))
        return decide(plan.config, session.gpus_of_a_node())
    assert plan.processes is not None
    console.say(f"starting Ray on this machine: {plan.processes.world_size} ranks on {plan.processes.device}")
    stack.enter_context(session.own(plan.processes, settings))
    return plan.processes


def _asker(folder: RunFolder, console: Console) -> Callable[[int], None]:
    def ask(number: int) -> None:
        folder.stop.write_text(signal.Signals(number).name, encoding="utf-8")
        console.say(
            f"{signal.Signals(number).name}: the ranks save a checkpoint and stop; once more to give up on them"
        )

    return ask


@dataclass
class Attempt:
    """One `fit()` in a thread of its own, where it neither installs nor meets signal handlers."""

    trainer: Any
    result: Any = None
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._fit, name="ray-train-fit", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:  # Ray raises SystemExit too; whatever it is, the main thread judges it
            self.error = error


@dataclass
class Launch:
    """One call of the command: attempts until the run ends, is stopped, or has failed too often."""

    config: RunConfig
    processes: Processes
    folder: RunFolder
    console: Console
    signals: StopSignals
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        patience_s = self.config.launch.resources_timeout_s
        self.room = Room(self.console.say, lambda: session.missing_resources(self.processes), patience_s)

    def run(self) -> int:
        """The exit code."""
        number = 0
        while True:
            attempt = self._start(number)
            self._watch(attempt)
            self.console.update()
            number += 1
            if number > _RELAUNCHES or self.signals.received or not _controller_died(attempt.error):
                return self._verdict(attempt)
            self.console.say("Ray Train's controller died; launching again from the last checkpoint")

    def _start(self, number: int) -> Attempt:
        from nsa_launch.on_ray.trainer import trainer

        launch_id = f"launch-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}-{number}"
        self.folder.record("launch", id=launch_id, pid=os.getpid(), world_size=self.processes.world_size)
        return Attempt(trainer(self.config, self.processes, launch_id))

    def _watch(self, attempt: Attempt) -> None:
        """Until the attempt ends, a rank refuses, a signal's grace is over, or no rank is there to hear the signal."""
        deadline = None
        while attempt.thread.is_alive():
            attempt.thread.join(_POLL_S)
            self.console.update()
            self.room.look(self.console.ranks_are_up)
            self.console.watch()
            if self.console.refusal:
                return
            if self.signals.received is None:
                continue
            deadline = deadline or time.monotonic() + self.config.launch.stop_grace_s
            if self.signals.aborted or not self.console.ranks_are_up or time.monotonic() > deadline:
                return

    def _verdict(self, attempt: Attempt) -> int:
        stopped_by = self.signals.received
        if self.console.refusal:
            self.console.say(self.console.refusal)
            return exit_codes.BAD_CONFIG
        if attempt.result is not None:
            ended = attempt.result.return_value
            self.console.finish(ended)
            if ended["failure"]:
                return exit_codes.FAILED
            return exit_codes.stopped_by(stopped_by) if stopped_by and ended["stopped"] else exit_codes.OK
        if stopped_by:
            self.console.say("stopped without an answer from the ranks; the last checkpoint is the one to resume from")
            return exit_codes.stopped_by(stopped_by)
        return self._failure(attempt.error)

    def _failure(self, error: BaseException | None) -> int:
        import ray.train

        if isinstance(error, ray.train.WorkerGroupError):
            self.console.show_failure(error.worker_failures)
            return exit_codes.FAILED
        if isinstance(error, ray.train.ControllerError) or _controller_died(error):
            self.console.say(f"Ray could not run the processes: {error}")
            return exit_codes.NO_RESOURCES
        self.console.say(f"Ray Train failed: {type(error).__name__}: {error}")
        return exit_codes.FAILED


def _controller_died(error: BaseException | None) -> bool:
    import ray.exceptions

    return isinstance(error, ray.exceptions.RayActorError)
