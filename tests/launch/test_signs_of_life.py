"""Signs of life, and what is told from them: who hangs, where the others wait, when it is said."""

import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launch_cases import tiny
from nsa_dist.train.refused import Refused
from nsa_launch.console import Console
from nsa_launch.hangs import nccl, signs
from nsa_launch.hangs.among_ranks import RankWatch
from nsa_launch.hangs.pulse import Pulse
from nsa_launch.hangs.signs import ALIVE, ENDED, FAILED, Sign, beat_s
from nsa_launch.hangs.verdict import described, hung
from nsa_launch.hangs.watch import HangWatch, hung_ranks
from nsa_launch.ranks.environment import of_nccl
from nsa_launch.run_folder import PROCESS_DIED, RunFolder, claimed

WAITS = ["nsa_dist/cp/comm.py:84 wait", "nsa_dist/cp/halo.py:29 wait", "nsa_dist/branches.py:60 attend"]
WORKS = ["nsa_dist/train/data/samples.py:40 __getitem__"]


def sign(rank: int, **changes) -> Sign:
    """Of a rank that waits in step 8, given at second 100."""
    given = Sign(
        rank, f"host-{rank // 2}", 1000 + rank, 1.0, "step", 8, 25.0, 0.2, WAITS, True, {"CP 0,1": 7}, ALIVE, 100.0
    )
    return replace(given, **changes)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    with claimed(tiny(tmp_path)) as folder:
        folder.topology.write_text("[{}, {}]")
        return folder


def give(folder: RunFolder, *given: Sign) -> None:
    for each in given:
        signs.write(folder.pulses, each)
        os.utime(signs.path_of(folder.pulses, each.rank), (each.written_s, each.written_s))


def test_a_sign_is_read_as_it_was_given(folder):
    give(folder, sign(1, usual_s=None))
    assert signs.read(folder.pulses, 1) == sign(1, usual_s=None)
    assert signs.read(folder.pulses, 0) is None
    assert signs.read_all(folder.pulses, folder.ranks()) == [sign(1, usual_s=None)]


def test_a_shorter_sign_leaves_nothing_of_a_longer_one(folder):
    give(folder, sign(0, where=["x" * 900] * 3))
    give(folder, sign(0, where=[]))
    assert signs.read(folder.pulses, 0) == sign(0, where=[])


def test_a_sign_is_cut_to_its_room(folder):
    give(folder, sign(0, where=["x" * 900] * 8))
    read = signs.read(folder.pulses, 0)
    assert read is not None
    assert 1 <= len(read.where) < 8


@pytest.mark.parametrize("spoiled", [b"", b"{", b"[1]", b'{"rank": 0}', b"\xff\0"])
def test_a_spoiled_sign_is_none(folder, spoiled):
    signs.path_of(folder.pulses, 0).write_bytes(spoiled)
    assert signs.read(folder.pulses, 0) is None


def test_who_does_not_answer_hangs():
    found = hung([sign(0), sign(1, written_s=78.0, waits=False, where=WORKS, begun={"CP 0,1": 6})])
    assert [str(each) for each in found] == [
        "rank 1 on host-0 does not answer: its process 1001 has given no sign for 22 s, last seen in step 8, at "
        "nsa_dist/train/data/samples.py:40 __getitem__"
    ]


def test_two_missed_beats_are_no_silence():
    assert hung([sign(0), sign(1, written_s=98.0)]) == []
    assert hung([sign(0, beat_s=16.0), sign(1, beat_s=16.0, written_s=70.0)]) == []


def test_who_has_begun_fewer_collectives_hangs():
    (found,) = hung([sign(0), sign(1, waits=False, where=WORKS, begun={"CP 0,1": 6})])
    assert "rank 1 on host-0 has not come to a collective of CP 0,1; it is in step 8, at nsa_dist/train" in str(found)


def test_who_is_in_no_collective_hangs():
    (found,) = hung([sign(0, begun={}), sign(1, begun={}, waits=False, where=WORKS)])
    assert "rank 1 on host-0 is in no collective" in str(found)


def test_nobody_is_accused_when_all_wait_or_none():
    assert hung([sign(0), sign(1)]) == []
    assert hung([sign(0, waits=False), sign(1, waits=False)]) == []


def test_the_failed_the_ended_and_the_dead_do_not_hang():
    assert hung([sign(0), sign(1, written_s=50.0, state=FAILED), sign(2, written_s=50.0, state=ENDED)]) == []
    assert hung([sign(0), sign(1, written_s=50.0)], dead={1}) == []


def test_ranks_that_wait_in_one_place_are_told_together():
    lines = described(
        [sign(0), *(sign(n) for n in range(2, 8)), sign(1, written_s=50.0), sign(9, where=WORKS, waits=False)]
    )
    assert lines[0].startswith("rank 1 on host-0 does not answer")
    assert lines[1:] == [
        "ranks 0, 2 to 7 wait in step 8, at nsa_dist/cp/comm.py:84 wait for nsa_dist/cp/halo.py:29 wait",
        "rank 9 on host-4 is in step 8, at nsa_dist/train/data/samples.py:40 __getitem__",
    ]


def test_who_has_failed_is_told_as_that():
    assert described([sign(0), sign(1, state=FAILED), sign(2, state=FAILED)])[0] == "ranks 1, 2 have failed"


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def polled(watch: HangWatch, clock: Clock, *seconds: float) -> list[float]:
    """The seconds at which something was said."""
    said = []
    for clock.s in seconds:
        if watch.poll() is not None:
            said.append(clock.s)
    return said


@pytest.mark.parametrize(
    ("words", "usual_s", "limit_s"),
    [
        ([], 0.2, 30),  # the least
        ([], None, 30),  # no step yet
        ([], 20.0, 200),  # a multiple of the last steps'
        (["stall_steps=3"], 20.0, 60),
        (["stall_least_s=50"], 0.2, 50),
        (["process_group_timeout_s=20"], 0.2, 10),  # before the groups give up
    ],
)
def test_a_standstill_is_said_at_its_limit_and_at_twice_that(tmp_path, folder, words, usual_s, limit_s):
    clock = Clock()
    watch = HangWatch(tiny(tmp_path, *words).launch, folder, clock)
    give(folder, sign(0, usual_s=usual_s), sign(1, usual_s=usual_s))
    times = [1.0, limit_s, limit_s + 1.0, limit_s + 2.0, 2 * limit_s + 0.5, 2 * limit_s + 1.0, 2 * limit_s + 2.0]
    assert polled(watch, clock, *times) == [limit_s + 1.0, 2 * limit_s + 2.0]


def test_a_run_that_moves_does_not_stand_still(tmp_path, folder):
    clock = Clock()
    watch = HangWatch(tiny(tmp_path).launch, folder, clock)
    for step in range(5):
        give(folder, sign(0, step=step))
        assert polled(watch, clock, 29.0 * step + 2) == []
    give(folder, sign(0, phase="validation", step=4))
    assert polled(watch, clock, 147.0, 170.0) == []
    assert polled(watch, clock, 178.0) == [178.0]


def test_the_console_says_a_standstill_and_writes_it_down(tmp_path, folder, capsys):
    clock = Clock()
    with Console(tiny(tmp_path), folder) as console:
        console._hangs = HangWatch(tiny(tmp_path).launch, folder, clock)
        give(folder, sign(0), sign(1, written_s=50.0))
        for clock.s in (2.0, 40.0):
            console.watch()
        assert capsys.readouterr().out == "", "no rank is up"
        folder.record("start", world_size=2, step=0)
        console.update()
        for clock.s in (42.0, 80.0, 82.0):
            console.watch()
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "nothing has moved for 38 s: the run is in step 8 (lately that took 0.2 s)",
        "  rank 1 on host-0 does not answer: its process 1001 has given no sign for 50 s, last seen in step 8, at "
        "nsa_dist/cp/comm.py:84 wait for nsa_dist/cp/halo.py:29 wait",
        "  rank 0 on host-0 waits in step 8, at nsa_dist/cp/comm.py:84 wait for nsa_dist/cp/halo.py:29 wait",
    ]
    assert '"event": "standstill"' in folder.launches.read_text()


def test_the_failure_after_a_hang_names_who_hung(folder, tmp_path, capsys):
    give(folder, sign(0, state=FAILED), sign(1, written_s=78.0))
    found = hung_ranks(folder, {0: "Timed out waiting 20000ms"}, 20)
    assert list(found) == ["1"]
    with Console(tiny(tmp_path), folder) as console:
        folder.record("failure", ranks={"0": "Timed out waiting 20000ms"}, hung=found)
        console.update()
    assert capsys.readouterr().out.startswith("rank 1 on host-0 does not answer")


def test_a_rank_that_works_for_ever_is_named_as_well(folder):
    give(folder, sign(0, state=FAILED), sign(1, waits=False, where=WORKS, begun={"CP 0,1": 6}))
    assert list(hung_ranks(folder, {0: "Timed out"}, 20)) == ["1"]


def test_a_rank_that_ray_misses_as_well_is_the_one_that_hung(folder):
    give(folder, sign(0, state=FAILED), sign(1, written_s=78.0))
    failed = {0: "Timed out waiting 20000ms", 1: "A worker health check has been hanging for 30 seconds"}
    assert list(hung_ranks(folder, failed, 20)) == ["1"]


def test_over_nccl_the_one_that_waited_dies_and_is_not_named(folder):
    give(folder, sign(0, written_s=100.0), sign(1, written_s=78.0))
    assert list(hung_ranks(folder, {0: PROCESS_DIED}, 20)) == ["1"]


def test_over_nccl_a_rank_that_works_for_ever_is_named_as_well(folder):
    give(folder, sign(0), sign(1, waits=False, where=WORKS, begun={"CP 0,1": 6}))
    assert list(hung_ranks(folder, {0: PROCESS_DIED}, 20)) == ["1"]


def test_a_rank_that_died_leaves_nobody_to_blame(folder):
    give(folder, sign(0, phase_s=2.0), sign(1, phase_s=2.0, written_s=99.0, begun={"CP 0,1": 6}))
    assert hung_ranks(folder, {1: PROCESS_DIED}, 20) == {}
    assert hung_ranks(folder, {0: "Connection closed by peer", 1: PROCESS_DIED}, 20) == {}


def test_signs_of_ranks_that_are_no_more_are_not_read(folder):
    give(folder, sign(0, state=FAILED), sign(1), sign(2, written_s=10.0))
    assert "2" not in hung_ranks(folder, {0: "Timed out"}, 20)


def test_a_launch_takes_the_signs_of_the_last_one_away(tmp_path, folder):
    give(folder, sign(5))
    with claimed(tiny(tmp_path)) as again:
        assert not list(again.pulses.iterdir())


def wait_here(event: threading.Event) -> None:
    event.wait()


def test_a_pulse_tells_where_the_thread_is_that_trains(folder):
    beaten, done = threading.Event(), threading.Event()

    def train() -> None:
        with Pulse(folder.pulses, 1, 2, beaten.set) as pulse:
            pulse.begins("step", 3)
            pulse.begins("step", 4)
            wait_here(done)

    thread = threading.Thread(target=train)
    thread.start()
    # A beat notes the phase before it looks where the thread is, which may have gone on in between.
    while (read := signs.read(folder.pulses, 1)) is None or read.step != 4 or not _waits_here(read):
        beaten.clear()
        beaten.wait()
    done.set()
    thread.join()
    assert read is not None
    assert (read.rank, read.pid, read.phase, read.step, read.state, read.waits) == (
        1,
        os.getpid(),
        "step",
        4,
        ALIVE,
        False,
    )
    assert read.usual_s is not None
    last = signs.read(folder.pulses, 1)
    assert last is not None
    assert last.state == ENDED


def _waits_here(read: signs.Sign) -> bool:
    return any("wait_here" in frame for frame in read.where)


def test_a_pulse_says_that_its_rank_failed_and_needs_no_disk(folder, tmp_path):
    with pytest.raises(KeyError), Pulse(folder.pulses, 0, 1):
        raise KeyError
    read = signs.read(folder.pulses, 0)
    assert read is not None
    assert read.state == FAILED
    (tmp_path / "file").touch()
    with Pulse(folder.pulses, 0, 1) as pulse:
        pulse._folder = tmp_path / "file"


def test_many_ranks_beat_less_often(tmp_path):
    assert [Pulse(tmp_path, 0, size).beat_s for size in (1, 64, 1024)] == [1.0, 1.0, 16.0]


class Speech:
    """`RankWatch` of one rank, at given times."""

    def __init__(self, folder: RunFolder, rank: int, launch) -> None:
        self.clock, self.watch = Clock(), RankWatch(launch, folder, rank)
        self.watch._watch = HangWatch(launch, folder, self.clock)

    def at(self, *seconds: float) -> None:
        for self.clock.s in seconds:
            self.watch.look()


def test_without_a_launcher_the_first_rank_that_answers_speaks(tmp_path, folder, capsys):
    give(folder, sign(0, written_s=50.0), sign(1))
    for rank in (1, 0):
        Speech(folder, rank, tiny(tmp_path).launch).at(2.0, 40.0)
        assert ("rank 0 on host-0 does not answer" in capsys.readouterr().err) == (rank == 1)


def test_without_a_launcher_a_failure_names_who_hung(tmp_path, folder, capsys):
    give(folder, sign(0, written_s=50.0), sign(1, state=FAILED))
    launch = tiny(tmp_path, "process_group_timeout_s=20").launch
    with pytest.raises(RuntimeError), RankWatch(launch, folder, 1).naming_the_hung():
        raise RuntimeError("Timed out waiting 20000ms for recv operation to complete")
    assert "rank 0 on host-0 does not answer" in capsys.readouterr().err
    assert '"hung": {"0"' in folder.launches.read_text()


def test_without_a_launcher_who_hung_is_named_before_nccl_ends_the_process(tmp_path, folder, capsys):
    give(folder, sign(0, written_s=50.0), sign(1))
    launch, over = tiny(tmp_path, "process_group_timeout_s=20").launch, []
    watch = RankWatch(launch, folder, 1, lambda: bool(over))
    watch.look()
    assert not folder.launches.exists()
    over.append(1)
    watch.look()
    watch.look()
    with pytest.raises(RuntimeError), watch.naming_the_hung():
        raise RuntimeError("NCCL communicator was aborted")
    assert capsys.readouterr().err.count("rank 0 on host-0 does not answer") == 1
    assert folder.launches.read_text().count('"hung": {"0"') == 1


class Group:
    """Of torch's: what its backend for GPUs says of itself."""

    def __init__(self, error: str | None) -> None:
        self._error = error

    def _get_backend(self, device: torch.device):
        if self._error is None:
            raise RuntimeError(f"No backend type associated with device type {device}")
        return SimpleNamespace(get_error=lambda: SimpleNamespace(name=self._error))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([], False), ([None], False), (["SUCCESS", "COMM_ERROR"], False), (["SUCCESS", None, "TIMEOUT"], True)],
)
def test_a_collective_of_any_group_may_have_timed_out(monkeypatch, errors, expected):
    monkeypatch.setattr(nccl, "groups_of_this_rank", lambda: [Group(error) for error in errors])
    assert not nccl.timed_out(), "no group yet"
    monkeypatch.setattr(nccl.dist, "is_initialized", lambda: True)
    assert nccl.timed_out() == expected


def test_without_nccl_no_collective_times_out_over_it():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not nccl.timed_out()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 64, 100, 1024])
def test_a_process_that_nccl_ends_lives_for_some_beats_more(num_ranks):
    settings = of_nccl(num_ranks)
    grace_s = 4 * int(settings["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000
    assert 4 * beat_s(num_ranks) <= grace_s <= 4 * beat_s(num_ranks) + 1


def test_a_refusal_is_nobodys_hang(tmp_path, folder, capsys):
    give(folder, sign(0, written_s=50.0), sign(1))
    with pytest.raises(Refused), RankWatch(tiny(tmp_path).launch, folder, 1).naming_the_hung():
        raise Refused("no")
    assert capsys.readouterr().err == ""
