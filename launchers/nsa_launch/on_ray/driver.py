"""Train through Ray: start or join it, start the ranks, show their progress, stop them on a signal."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psutil

from nsa_launch import exit_codes
from nsa_launch.config import RunConfig
from nsa_launch.console import Console
from nsa_launch.on_ray import autoscaler, environment, session
from nsa_launch.on_ray.elastic import Elastic
from nsa_launch.on_ray.failures import controller_died, is_out_of_memory, plain, reason
from nsa_launch.on_ray.joining import reach
from nsa_launch.on_ray.joining.address import Address, find
from nsa_launch.on_ray.room import Room
from nsa_launch.on_ray.shown.startup import Startup
from nsa_launch.processes import Machine, Processes, check_groups, check_machine, decide
from nsa_launch.run_folder import MORE_MEMORY, OUT_OF_MEMORY, RunFolder
from nsa_launch.stop_signals import StopSignals

_RELAUNCHES = 2  # Ray Train restarts lost ranks, but nobody restarts its controller: we do
_POLL_S = 0.2
_STAGES = {  # what the console has seen, and the stage of the start which that ends
    "event processes": "processes",
    "event start": "imports",
    "record start": "model and data",
    "record train": "first steps",
}


@dataclass(frozen=True)
class Plan:
    """What was settled before anything started. With an address, the cluster there decides about `processes`."""

    config: RunConfig
    address: Address | None
    processes: Processes | None
    welcome: Mapping[str, str] = field(default_factory=dict)  # environment in which Ray takes us in


def plan(config: RunConfig, machine: Machine) -> Plan:
    """ValueError on everything that can be refused without Ray; ConnectionError when none answers within seconds."""
    check_groups(config)
    address = find(config.launch.address)
    if address is not None:
        return Plan(config, address, None, reach.check(address))
    processes = decide(config, machine.gpus)
    check_machine(processes, machine)
    return Plan(config, None, processes, environment.own_ray_settings())


def run(plan: Plan, folder: RunFolder) -> int:
    """Train and return the exit code (`nsa_launch.exit_codes`)."""
    began_s = time.monotonic() - (time.time() - psutil.Process().create_time())
    settings = environment.ray_settings(plan.config)
    environment.prepare_driver({**settings, **plan.welcome})
    with Console(plan.config, folder) as console, StopSignals(_asker(folder, console)) as signals, ExitStack() as ray:
        try:
            startup = Startup(console.say, began_s)
            processes = _enter_ray(plan, settings, console, ray)
            startup.reached("Ray")
        except (ConnectionError, ValueError) as refusal:
            console.say(str(refusal))
            return exit_codes.BAD_CONFIG
        except session.RayDidNotStart as failure:
            console.say(str(failure))
            return exit_codes.NO_RESOURCES
        signals.install()  # ray.init took SIGTERM over
        return Launch(plan.config, processes, folder, console, signals, startup).run()


def _enter_ray(plan: Plan, settings: Mapping[str, str], console: Console, stack: ExitStack) -> Processes:
    threading.Thread(target=_import_trainer, name="import-ray-train", daemon=True).start()
    if plan.address is not None:
        console.say(f"joining Ray at {plan.address.text}")
        stack.enter_context(session.joined(plan.address, settings, console.say))
        return session.processes_of_cluster(plan.config, console.say)
    assert plan.processes is not None
    console.say(f"starting Ray on this machine: {plan.processes.world_size} ranks on {plan.processes.device}")
    missing = session.missing_of_dashboard()
    if missing:
        console.say(f"Ray has no dashboard here, as {missing} is not installed; pip install 'ray[default]' brings it")
    stack.enter_context(session.own(plan.processes, settings, console.say))
    return plan.processes


def _import_trainer() -> None:
    """Seconds of imports, while Ray starts its processes; what fails here fails again where it is used."""
    with suppress(Exception):
        import nsa_launch.on_ray.trainer  # noqa: F401


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
    startup: Startup
    elastic: Elastic = field(init=False)
    room: Room = field(init=False)
    num_attempts: int = 0
    times_are_known: bool = False
    stopped_early: bool = False  # by STOP, which only ranks that are up can answer

    def __post_init__(self) -> None:
        self.elastic = Elastic(self.config)
        patience_s = self.config.launch.resources_timeout_s
        self.room = Room(self.console.say, lambda: session.missing_resources(self.processes), patience_s)

    def run(self) -> int:
        """The exit code."""
        number = 0
        while True:
            attempt = self._start()
            self._watch(attempt)
            self.console.update()
            number += 1
            if attempt.error is not None and self._resize(attempt.error):
                number = 0
                continue
            if attempt.error is None or not self._may_launch_again(number, attempt.error):
                return self._verdict(attempt)
            why = reason(attempt.error)
            self.folder.record("controller", reason=why)
            self.console.say(f"Ray Train's controller: {why}; launching again from the last checkpoint")
            session.release_placement()

    def _resize(self, error: BaseException) -> bool:
        """Whether an elastic run goes on after `error`; then `processes` are those that it goes on with."""
        if not self.elastic.is_on or self.signals.received or self.stopped_early or self.console.refusal:
            return False
        then = self.elastic.next(self.processes, error, session.whole_nodes(self.processes, self.config.launch))
        if then is None:
            return False
        if then != self.processes:
            self.console.say(self.elastic.described(self.processes, then))
            self.folder.record("resized", nodes=then.nodes, world_size=then.world_size)
        self.processes = then
        return True

    def _may_launch_again(self, number: int, error: BaseException) -> bool:
        return number <= _RELAUNCHES and not self.signals.received and controller_died(error)

    def _start(self) -> Attempt:
        from nsa_launch.on_ray.trainer import trainer

        launch_id = f"launch-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}-{self.num_attempts}"
        self.num_attempts += 1
        self.folder.record("launch", id=launch_id, pid=os.getpid(), world_size=self.processes.world_size)
        return Attempt(trainer(self.config, self.processes, launch_id))

    def _watch(self, attempt: Attempt) -> None:
        """Until the attempt ends, a rank refuses, a signal's grace is over, or no rank is there to hear the signal."""
        deadline = None
        while attempt.thread.is_alive():
            attempt.thread.join(_POLL_S)
            self.console.update()
            self._watch_startup()
            self.room.look(self.console.ranks_are_up)
            self.console.watch()
            if self.console.refusal:
                return
            if self.signals.received is None:
                self.stopped_early = self.folder.stop.exists() and not self.console.ranks_are_up
                if self.stopped_early:
                    return
                continue
            deadline = deadline or time.monotonic() + self.config.launch.stop_grace_s
            if self.signals.aborted or not self.console.ranks_are_up or time.monotonic() > deadline:
                return

    def _watch_startup(self) -> None:
        for milestone, stage in _STAGES.items():
            if milestone in self.console.milestones:
                self.startup.reached(stage)
        if self.startup.is_over and not self.times_are_known:
            self.times_are_known = True
            self.folder.record("first steps", seconds={k: round(s, 2) for k, s in self.startup.seconds.items()})
        self.startup.wait(self._growth)

    def _growth(self) -> str:
        """While no rank has a process: the nodes that are coming up."""
        if "event processes" in self.console.milestones:
            return ""
        return autoscaler.growth()

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
        if self.stopped_early:
            self.console.say(
                f"{self.folder.stop} asks for an end, and no rank is up; the last checkpoint is the one to resume from"
            )
            return exit_codes.OK
        if stopped_by:
            self.console.say("stopped without an answer from the ranks; the last checkpoint is the one to resume from")
            return exit_codes.stopped_by(stopped_by)
        return self._failure(attempt.error)

    def _failure(self, error: BaseException | None) -> int:
        import ray.train

        if isinstance(error, ray.train.WorkerGroupError):
            self.console.show_failure(error.worker_failures)
            return exit_codes.FAILED
        if error is not None and is_out_of_memory(error):
            self.console.say(f"Ray Train's controller: {OUT_OF_MEMORY}, {_RELAUNCHES + 1} times; {MORE_MEMORY}")
            return exit_codes.FAILED
        said = plain(str(error), longest=600)
        if isinstance(error, ray.train.ControllerError) or controller_died(error):
            self.console.say(f"Ray could not run the processes: {said}")
            return exit_codes.NO_RESOURCES
        self.console.say(f"Ray Train failed: {type(error).__name__}: {said}")
        return exit_codes.FAILED
