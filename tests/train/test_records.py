"""Lines of `metrics.jsonl` and `launches.jsonl` that are no records: passed over, counted, and in nobody's way."""

import pytest

from nsa_dist.train.files.metrics import MetricsLog
from nsa_dist.train.files.records import MetricsFollower, read_metrics
from ranks import run_ranks
from train_cases import goes_on, records, stops, write_texts

WHOLE = b'{"kind": "train", "step": 1, "loss": 3.0}'
# A crash tears a line, a disk zeroes or garbles a page, an editor adds something.
NO_RECORDS = {
    "torn": b'{"kind": "train", "st',
    "two in one": WHOLE[:20] + WHOLE,
    "garbage": bytes(range(128, 256)).replace(b"\n", b""),
    "not UTF-8": b'{"kind": "\xff"}',
    "zeroes": b"\0" * 4096,
    "zeroes within": WHOLE[:10] + b"\0\0" + WHOLE[10:],
    "a list": b'["kind", "train"]',
    "a number": b"12",
    "a text": b'"train"',
    "null": b"null",
    "nested": b"[" * 100_000,
    "a number without an end": b'{"step": ' + b"1" * 5000 + b"}",
    "half of a carriage return": b'{"kind"\r: "train", "step": 1',
}
# Objects that lack what is read of them.
INCOMPLETE = {
    "empty": b"{}",
    "no kind": b'{"step": 1, "loss": 3.0}',
    "no step": b'{"kind": "train", "loss": 2.0}',
    "a step in words": b'{"kind": "train", "step": "one", "loss": 2.0}',
    "no loss": b'{"kind": "train", "step": 1}',
    "a kind that is a list": b'{"kind": ["train"], "step": 1, "loss": 2.0}',
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS.keys())
def test_what_is_no_record_is_passed_over_and_counted(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    path.write_bytes(WHOLE + b"\n" + line + b"\n")
    assert len(follower.poll()) == 1
    with path.open("ab") as file:
        file.write(line + b"\n" + WHOLE + b"\n")
    assert len(follower.poll()) == 1, "what comes after it is read"
    assert follower.num_skipped == 2
    assert follower.poll() == []
    assert follower.num_skipped == 2, "each line counts once"


@pytest.mark.parametrize("line", (NO_RECORDS | INCOMPLETE).values(), ids=(NO_RECORDS | INCOMPLETE).keys())
def test_what_is_incomplete_is_no_number_of_a_run(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + b"\n" + line + b"\n")
    assert [record["loss"] for record in read_metrics(path, "train")] == [3.0]


def test_a_torn_end_does_not_take_the_next_record_along(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(NO_RECORDS["garbage"] + b"\n" + NO_RECORDS["torn"])
    with MetricsLog(path, tmp_path / "tensorboard", first_step=2) as log:
        log.write({"kind": "train", "step": 2, "loss": 2.5})
    assert [record["loss"] for record in read_metrics(path, "train")] == [2.5]


@pytest.mark.slow
def test_a_run_goes_on_over_spoiled_lines_to_its_pictures(tmp_path):
    write_texts(tmp_path / "texts")
    run_ranks(1, stops, tmp_path, "spoiled")
    with (tmp_path / "spoiled/metrics.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in (NO_RECORDS | INCOMPLETE).values())
        file.write(NO_RECORDS["torn"])
    (ended,) = run_ranks(1, goes_on, tmp_path, "spoiled")
    assert [record["step"] for record in records(tmp_path, "spoiled")] == list(range(1, ended.step + 1))
    assert (tmp_path / "spoiled/loss.png").exists()
