"""What a value may be: in a file and as a word, accepted as what it looks like or refused with what to do."""

import math

import pytest

from launch_cases import tiny, tiny_file
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.config_errors import parse
from nsa_dist.train.refused import Refused
from nsa_launch import cli, exit_codes
from nsa_launch.config import RunConfig, load
from nsa_launch.on_ray import driver

HUGE = "9" * 26
NAMES = [
    "20261128",
    "2026-11-28",
    "1.50",
    "yes",
    "null",
    "020",
    "runs/a #1",
    "a: b",
    "[x",
    "*a",
    "&b",
    "!c",
    "it's",
    "%d",
]
TEXTS = ["1", "020", "1:30", "0x1F", "1.10", "yes", "off", "2026-11-28", "1e5", "a #1", "{a: b}", "it's", ""]
FLOATS = [
    f"{section}.{name}" + (".recall" if name == "tasks" else "")  # a mapping of them
    for section, field in RunConfig.model_fields.items()
    for name, key in field.annotation.model_fields.items()
    if float in (key.annotation, *getattr(key.annotation, "__args__", ()))
]
INTS = [
    f"{section}.{name}"
    for section, field in RunConfig.model_fields.items()
    for name, key in field.annotation.model_fields.items()
    if int in (key.annotation, *getattr(key.annotation, "__args__", ()))
]


def short(value: str | bytes) -> str:
    """A test's name must not have the whole of it."""
    return ascii(value)[:40]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e999", "-1e999"])
@pytest.mark.parametrize("key", FLOATS)
def test_every_float_is_finite(tmp_path, key, value):
    with pytest.raises(Refused, match=f"{key}: .*(finite|greater|less)"):
        tiny(tmp_path, f"{key}={value}")


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", "9" * 5000, "1e300", "true", "yes"], ids=short)
@pytest.mark.parametrize("key", INTS)
def test_every_whole_number_has_bounds_and_is_one(tmp_path, key, value):
    with pytest.raises(Refused, match=key):
        tiny(tmp_path, f"{key}={value}")


@pytest.mark.parametrize("value", [10**26, 10**5000, True, math.inf], ids=["26 digits", "5000", "true", "infinite"])
def test_a_seed_from_a_program_has_bounds_as_well(value):
    with pytest.raises(Refused, match=r"run\.seed"):
        parse(TrainConfig, {"run": {"output_dir": "x", "seed": value}}, "a program")


@pytest.mark.parametrize("value", ["1e-9", "1e12"])
@pytest.mark.parametrize("key", ["process_group_timeout_s", "start_timeout_s", "resources_timeout_s", "stop_grace_s"])
def test_a_time_is_one_that_can_be_waited(tmp_path, key, value):
    with pytest.raises(Refused, match=r"seconds are no time to wait; take 0\.001 to 1e\+09"):
        tiny(tmp_path, f"{key}={value}")


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("steps=020", "run.steps", 20),
        ("steps=0x20", "run.steps", 32),
        ("steps=1_000", "run.steps", 1000),
        ("steps=1e3", "run.steps", 1000),
        ("steps= 50 ", "run.steps", 50),
        ("lr=4e-3", "optimizer.lr", 4e-3),
        ("resume=yes", "run.resume", True),
        ("folder=null", "data.folder", None),
        ("pattern=*.txt", "data.pattern", "*.txt"),
        ("pattern='*.txt'", "data.pattern", "*.txt"),
        ("pattern=no", "data.pattern", "no"),
        ("nvlink_label=1.10", "launch.nvlink_label", "1.10"),
        ("processes_per_node=null", "launch.processes_per_node", None),
    ],
)
def test_a_word_is_what_it_looks_like(tmp_path, word, key, value):
    section, name = key.split(".")
    got = getattr(getattr(tiny(tmp_path, word), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_text_that_was_given(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert tiny(tmp_path, f"output_dir={name}").run.output_dir == tmp_path / name


@pytest.mark.parametrize("value", TEXTS)
def test_an_environment_has_the_text_that_was_given(tmp_path, value):
    assert tiny(tmp_path, f"launch.env.A={value}").launch.env == {"A": value}


def test_numbers_of_an_environment_in_a_file_are_their_text(tmp_path):
    path = tiny_file(tmp_path)
    env = '  env: {NCCL_P2P_DISABLE: 1, 2: 020, B: yes, C: 2026-11-28, D: ""}'
    path.write_text(path.read_text().replace("launch:\n", f"launch:\n{env}\n"))
    assert load(path).launch.env == {"NCCL_P2P_DISABLE": "1", "2": "020", "B": "yes", "C": "2026-11-28", "D": ""}


def test_names_in_a_mapping_may_have_dots(tmp_path):
    config = tiny(tmp_path, "launch.label_selector.ray.io/zone=a", "launch.label_selector.b=1")
    assert config.launch.label_selector == {"ray.io/zone": "a", "b": "1"}


def test_a_merged_mapping_is_merged(tmp_path):
    path = tiny_file(tmp_path)
    env = "  env: &base {A: 1, B: 2}\n  label_selector: {<<: *base, B: 3}"
    path.write_text(path.read_text().replace("launch:\n", f"launch:\n{env}\n"))
    config = load(path)
    assert config.launch.env == {"A": "1", "B": "2"}
    assert config.launch.label_selector == {"A": "1", "B": "3"}


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("steps=1:30", r"run\.steps: .*valid integer.*given '1:30'"),
        ("steps=5 #x", "ends in a comment.*leave the comment out"),
        ("label_selector={a: b} # c", "ends in a comment.*leave the comment out"),
        ("lr=1e-3 # c", "ends in a comment.*leave the comment out"),
        ("steps=!!python/none x", "the tag .* has no meaning in a configuration; leave it out"),
        ("steps=---\n5\n---\n6", "is not YAML; quote it"),
        ("steps=" + "[" * 3000, r"is not YAML; quote it.*nests deeper.*take the brackets out"),
        ("label_selector={[a]: b}", "a key is a list, and keys are names; write name: value"),
        ("a" + ".a" * 3000 + "=1", "there is no key .*one is section.key"),
        ("launch.env.=1", "'' is no name.*drop it"),
        ("output_dir=", r"run\.output_dir: it is empty.*name a folder"),
        ("folder=", r"data\.folder: it is empty.*name a folder"),
        ("output_dir=$USER/runs", r"has a variable that no shell has replaced.*write out what it stands for"),
        ("folder=${DATA}", r"has a variable that no shell has replaced.*write out what it stands for"),
        ("output_dir=~nosuch/x", r"output_dir=~nosuch/x cannot be made absolute.*write the whole path out"),
        ("folder=~nosuch/x", r"data\.folder=~nosuch/x cannot be made absolute.*write the whole path out"),
        ("output_dir=" + 300 * "a", "300 between two slashes.*take a shorter one"),
        ("output_dir=" + 30 * ("a" * 200 + "/"), "with the names below it; take a shorter one"),
        ("output_dir=a\tb\x07", "has control characters.*name another folder"),
        ("output_dir=a\udcff", "is not UTF-8.*rename that folder"),
        ("pattern=/etc/*", r"cannot be matched against names below data\.folder.*name the folder in data\.folder"),
        ("pattern=../*", r"cannot be matched.*name the folder in data\.folder"),
        ("pattern=**.txt", r"cannot be matched.*such as \*\.txt"),
        ("pattern=", "is empty or cannot be printed.*give a name"),
        ("address=", "is empty or cannot be printed.*give a name"),
        ("accelerator_type=\x00", "is empty or cannot be printed.*give a name"),
    ],
    ids=short,
)
def test_a_word_is_refused_with_its_remedy(tmp_path, word, remedy):
    with pytest.raises(Refused, match=remedy) as caught:
        tiny(tmp_path, word)
    assert len(str(caught.value)) < 1000


NESTED = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"? [a]\n: b", "line 1, column 3: a key is a list, and keys are names; write name: value"),
        (b"? {a: b}\n: b", "a key is a mapping, and keys are names; write name: value"),
        (b"run: {? [a] : b}", "a key is a list"),
        (b"[" * 3000, "nests deeper than any configuration.*take the brackets out"),
        (b"{a: " * 3000, "nests deeper than any configuration.*take the brackets out"),
        (b"run: &r {<<: *r}", "nests deeper than any configuration.*take the brackets out|unconstructable"),
        (b"run: {output_dir: \xff\xfe}", "is not UTF-8 text .*at byte 18"),
        ("run: {output_dir: x}".encode("utf-16"), "is not UTF-8 text"),
        (b"run: {output_dir: \0}", "is not valid YAML: character 18 is #x0000"),
        (b"#" * 2**21, "longer than 1048576 bytes.*the first argument is a YAML file"),
        (b"", "holds NoneType, but a configuration is a mapping of sections"),
        (b"--- {run: {}}\n--- {run: {}}", "is not valid YAML.*another document"),
        (b"run: !!python/object/apply:os.getcwd []", "the tag .* has no meaning in a configuration; leave it out"),
        (b"run: {steps: !!timestamp x, output_dir: x}", "the tag .* has no meaning in a configuration; leave it out"),
        (b"run: {steps: !!int x, output_dir: x}", r"run\.steps: .*valid integer"),
        (b"run: {output_dir: x, resume: !!bool x}", r"run\.resume: .*valid boolean"),
        (b"run: {<<: 3}", "is not valid YAML: .*merging"),
        (b"base: &b {steps: 20}\nrun: {<<: *b, output_dir: x}", "line 1.*'base' is no section.*name its mapping where"),
        (b"x: &x {}\ny: &y {}\nrun: {<<: [*x, *y], output_dir: x}", "'x' is no section.*as in run: &base"),
        (b"run: {output_dir: [a, &b [*b]]}", r"run\.output_dir"),
        (b"run: {output_dir: x}\n" + NESTED.encode(), "a0: no such key(.|\n)*and 10 more"),
        (NESTED.encode() + b"run: {output_dir: x, steps: *a29}", r"run\.steps"),
        (b"".join(b"k%d: 1\n" % i for i in range(5000)), "and 4981 more"),
        (b"run: {output_dir: x, " + b"k" * 1000 + b": 1}", r"run\.k+\.\.\.: no such key"),
        (b"run: {output_dir: x, dtype: " + b"k" * 100_000 + b"}", r"run\.dtype: .*given 'kkk"),
        (b"1: {}\nnull: 2\nrun: {output_dir: x}", "1: no such key(.|\n)*null: no such key"),
        (b"run: 3", r"run: .*dictionary.*given 3"),
        (b"run:\n", r"run: .*dictionary.*given None"),
    ],
    ids=short,
)  # fmt: skip
def test_a_file_is_refused_with_its_remedy(tmp_path, content, remedy):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(Refused, match=remedy) as caught:
        load(path)
    assert "wrong.yaml" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_the_command_says_one_line_for_a_file_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "run", lambda *_: pytest.fail("it was started"))
    (tmp_path / "latin.yaml").write_bytes("run: {output_dir: é}".encode("latin-1"))
    for words in (["train", str(tmp_path / "latin.yaml")], ["config", str(tmp_path / "latin.yaml")]):
        assert cli.main(words) == exit_codes.BAD_CONFIG
        assert capsys.readouterr().err.splitlines()[0].endswith("the first argument is a YAML file")


def test_another_error_of_the_checks_is_no_refusal(tmp_path, monkeypatch):
    """A mistake of ours must not look like one of the caller's."""
    from nsa_launch import config

    def broken(*_):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(config, "_check_own_file", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(["train", str(tiny_file(tmp_path))])
