"""What the console says follows from the run's files alone."""

import pytest

from launch_cases import tiny
from nsa_dist.train.files.records import MetricsFollower
from nsa_launch.console import Console
from nsa_launch.run_folder import PROCESS_DIED, RunFolder, claimed

NO_RECORDS = {
    "torn": b'{"event": "st',
    "garbage": b"\x80\xff\x00",
    "zeroes": b"\0" * 512,
    "a list": b"[1]",
    "not UTF-8": b'{"event": "\xff"}',
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    with claimed(tiny(tmp_path)) as folder:
        return folder


def write(folder: RunFolder, *lines: str) -> None:
    with folder.output.metrics.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def test_old_news_is_not_told_again(tmp_path, folder, capsys):
    folder.record("start", world_size=2, step=0)
    with Console(tiny(tmp_path), folder) as console:
        console.update()
        assert capsys.readouterr().out == ""
        assert not console.ranks_are_up
        folder.record("start", world_size=2, step=5)
        console.update()
    assert capsys.readouterr().out == "2 ranks are up, training from step 5\n"
    assert console.ranks_are_up


def test_the_dead_rank_is_blamed_not_its_partners(tmp_path, folder, capsys):
    with Console(tiny(tmp_path, "max_failures=1"), folder) as console:
        for _ in range(2):
            folder.record("failure", ranks={"0": "Connection closed by peer", "1": PROCESS_DIED})
        console.update()
    assert capsys.readouterr().out.splitlines() == [
        "rank 1 died; all ranks start again from the last checkpoint (1 of 1 times)",
        "rank 1 died; that was one failure more than launch.max_failures=1",
    ]


def test_a_refusal_is_kept_for_the_exit_code(tmp_path, folder):
    with Console(tiny(tmp_path), folder) as console:
        folder.record("refused", reason="no text files in x")
        console.update()
        assert console.refusal == "no text files in x"


def test_pipes_get_lines_of_progress(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(
            folder,
            '{"kind": "validation", "step": 0, "loss": 5.5}',
            '{"kind": "train", "step": 1, "loss": 5.25, "tokens_per_s": 1500}',
            '{"kind": "train", "step": 2, "loss": 5.0, "tokens_per_s": 1500}',
            '{"kind": "train", "step": 24, "loss": 4.0, "mtp_loss": [4.5, null], "tokens_per_s": 1500}',
        )
        console.update()
    assert capsys.readouterr().out.splitlines() == [
        "step 0/24  validation 5.5000",
        "step 1/24  loss 5.2500  1,500 tokens/s",  # the second comes too soon after it
        "step 24/24  loss 4.0000 (mtp 4.5000, -)  1,500 tokens/s",
    ]


TASKS = '{"kind": "tasks", "step": %d, "tasks": {"recall": {"accuracy": %s}, "copy": {"accuracy": 1.0}}}'


def test_answers_are_told_where_losses_are(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, TASKS % (0, 0.125), TASKS % (24, 0.5))
        console.update()
        told = capsys.readouterr().out.splitlines()
        assert told == ["step 0/24  answers recall 12.5%, copy 100.0%", "step 24/24  answers recall 50.0%, copy 100.0%"]
        console.finish({"step": 24, "stopped": False})
    assert "answers      recall 50.0%, copy 100.0% (step 24)" in capsys.readouterr().out


def test_the_last_words_name_losses_and_places(tmp_path, folder, capsys):
    write(folder, '{"kind": "validation", "step": 0, "loss": 5.5}', '{"kind": "validation", "step": 24, "loss": 2.25}')
    (folder.path / "loss.png").touch()
    with Console(tiny(tmp_path), folder) as console:
        console.finish({"step": 24, "stopped": False})
    said = capsys.readouterr().out
    assert "finished step 24 of 24" in said
    assert "validation loss 5.5000 (step 0) -> 2.2500 (step 24)" in said
    assert all(str(folder.path / name) in said for name in ("metrics.jsonl", "checkpoints", "loss.png"))


START = (
    '{"kind": "start", "step": 0, "context_parallel_size": %d, "layout": "zigzag", "load_imbalance": 1.0, '
    '"kv_fetch_budget_bytes": null, "whole_shard_fraction": 1.0, "keep_pages": false, "head_groups": 4}'
)


def test_the_choices_of_context_parallelism_are_told_at_the_start(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, START % 1)
        console.update()
        assert capsys.readouterr().out == ""
        write(folder, START % 2)
        console.update()
    assert capsys.readouterr().out == (
        "2 context-parallel ranks, zigzag, load imbalance 1.00; "
        "kv_fetch_budget_bytes=None, whole_shard_fraction=1, keep_pages=False, head_groups=4\n"
    )


def test_groups_that_sizes_chose_are_told_as_such(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, (START % 4)[:-1] + ', "head_groups_by_sizes": true}')
        console.update()
    assert capsys.readouterr().out.endswith(", head_groups=4 by sizes\n")


def test_domains_are_told_at_the_start(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, (START % 4)[:-1] + ', "domain_size": 2}')
        console.update()
    assert capsys.readouterr().out.endswith(", head_groups=4, domains of 2 ranks\n")


def test_the_transport_is_told_with_its_reason(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, (START % 2)[:-1] + ', "transport": "all_to_all, as its ranks are on 2 hosts"}')
        console.update()
    assert capsys.readouterr().out.endswith("\ntransport: all_to_all, as its ranks are on 2 hosts\n")


def test_the_link_that_set_the_fraction_is_told(tmp_path, folder, capsys):
    with Console(tiny(tmp_path), folder) as console:
        write(
            folder,
            (START % 2).replace('"whole_shard_fraction": 1.0', '"whole_shard_fraction": 0.9204', 1)[:-1]
            + ', "link_gb_per_s": 50.0}',
        )
        console.update()
    assert "whole_shard_fraction=0.92 for links of 50 GB/s, keep_pages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("formula", "verdict"), [(2_000_000, "as the formulas say"), (1_500_000, "the formulas say 1.5 MB")]
)
def test_the_last_words_compare_bytes_with_the_formulas(tmp_path, folder, capsys, formula, verdict):
    sent = '{"halo": 500000, "pages": 1000000, "pages.grad": 500000}'
    write(
        folder,
        f'{{"kind": "traffic", "step": 24, "sent_bytes": {sent}, "formula_bytes": {{"halo": {formula}}}, '
        '"union_fraction": 0.625, "load_imbalance": 1.04}',
    )
    with Console(tiny(tmp_path), folder) as console:
        console.finish({"step": 24, "stopped": False})
    line = (
        f"2.0 MB sent in step 24, {verdict}; 75% of it pages and their gradients, "
        "62% of the remote blocks chosen; load imbalance 1.04"
    )
    assert line in capsys.readouterr().out


def test_a_failure_shows_the_end_of_what_ranks_wrote(tmp_path, folder, capsys):
    folder.rank_log(1).write_text("".join(f"line {i}\n" for i in range(100)))
    with Console(tiny(tmp_path), folder) as console:
        console.show_failure({0: RuntimeError(), 1: RuntimeError()})
    said = capsys.readouterr().out
    assert "line 99" in said
    assert "line 20\n" not in said
    assert "rank-0000.log was never written" in said
    assert f"what every rank wrote is in {folder.logs}" in said


@pytest.mark.parametrize("name", ["launches.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS.keys())
def test_a_bad_line_is_said_once_and_hides_nothing(tmp_path, folder, capsys, name, line):
    with (folder.path / name).open("ab") as file:
        file.write(line + b"\n")  # from before this launch
    with Console(tiny(tmp_path), folder) as console:
        for step in (1, 2):
            with (folder.path / name).open("ab") as file:
                file.write(line + b"\n")
            write(folder, f'{{"kind": "validation", "step": {step}, "loss": 5.5}}')
            folder.record("start", world_size=2, step=step)
            console.update()
        assert console.ranks_are_up
        console.finish({"step": 2, "stopped": True})
    said = capsys.readouterr().out
    assert "2 ranks are up, training from step 2" in said
    assert "step 2/24  validation 5.5000" in said
    assert said.count(f"{folder.path / name} has 3 lines that are no records; they were passed over") == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "start"}', '{"event": "failure"}', '{"event": "failure", "ranks": {}}', '{"step": 1}',
        '{"event": [1]}', '{"event": "failure", "ranks": 3}', '{"event": "notice"}', '{"event": "refused"}',
    ],
)  # fmt: skip
def test_an_event_without_its_facts_is_said_once_and_hides_nothing(tmp_path, folder, capsys, line):
    with Console(tiny(tmp_path), folder) as console:
        with folder.launches.open("a") as file:
            file.write(line + "\n")
        folder.record("notice", text="what comes after it")
        console.update()
    said = capsys.readouterr().out
    assert "note: what comes after it" in said
    assert said.count("1 records of this launch lack what is shown of them") == (line != '{"event": [1]}')


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "step": 3}', '{"kind": "train", "step": 3, "loss": "a", "tokens_per_s": 2}', '{"step": 3}',
        '{"kind": "start", "step": 3}', '{"kind": "start", "step": 3, "changed": [1]}', '{"kind": "validation"}',
        '{"kind": "traffic", "step": 4, "sent_bytes": {"pages": 0, "pages.grad": 0}, "formula_bytes": {}}',
    ],
)  # fmt: skip
def test_numbers_that_are_missing_hide_no_others(tmp_path, folder, capsys, line):
    with Console(tiny(tmp_path), folder) as console:
        write(folder, line, '{"kind": "validation", "step": 4, "loss": 5.5}')
        console.update()
        console.finish({"step": 4, "stopped": True})
    said = capsys.readouterr().out
    assert "step 4/24  validation 5.5000" in said
    assert "checkpoints " in said
    assert "records of this launch lack what is shown of them" in said


def test_an_event_begins_its_own_line_after_a_torn_one(folder):
    with folder.launches.open("ab") as file:
        file.write(b'{"event": "sta')
    folder.record("refused", reason="why")
    follower = MetricsFollower(folder.launches)
    assert [event["event"] for event in follower.poll()] == ["refused"]
    assert follower.num_skipped == 1
