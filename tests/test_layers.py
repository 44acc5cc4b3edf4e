"""Who may import whom, and what only one place may do. Read from the source text: nothing is imported."""

import ast
from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_MODULES = 14
CONTRACTS = {"nsa_kernels.contracts", "nsa_kernels.decode_contracts"}
THIRD_PARTY = {"torch", "triton", "megatron", "ray", "pydantic", "yaml", "rich", "matplotlib", "tensorboard", "numpy"}
KERNELS = {"torch", "triton", "nsa_kernels"}
CP = {"torch", "nsa_kernels", "nsa_dist.cp", "nsa_dist.config"}
BRANCHES = CP | {"nsa_dist.branches", "nsa_dist.compress"}
ATTENTION = BRANCHES | {"nsa_dist.attention", "nsa_dist.compiled", "nsa_dist.operators", "nsa_dist.saved"}
INFERENCE = ATTENTION | {"nsa_dist", "nsa_dist.layer", "nsa_dist.inference", "nsa_dist.rope", "nsa_dist.rope_scaling"}
MCORE = ATTENTION | {
    "nsa_dist",
    "nsa_dist.rope",
    "nsa_dist.rope_scaling",
    "nsa_dist.inference",
    "nsa_dist.mcore",
    "megatron",
}
TRAIN = MCORE | INFERENCE | {"nsa_dist.train", "nsa_dist.convert", "pydantic", "yaml", "rich", "matplotlib", "numpy"}
PLANNER = TRAIN | {"nsa_dist.planner"}
BENCH = PLANNER | {"nsa_dist.bench"}
LAUNCH = BENCH | INFERENCE | {"nsa_dist.convert", "nsa_launch", "ray"}

# From the bottom of the house to its top: what each storey may import beyond the standard library.
STOREYS = {
    "kernels/nsa_kernels": KERNELS,
    "kernels/nsa_kernels/bench": KERNELS | {"nsa_dist"},  # times the layer as users call it; nothing imports it back
    "nsa_dist/config.py": set(),
    "nsa_dist/cp": CP,
    "nsa_dist/compress.py": CP | {"nsa_dist.rope", "nsa_dist.rope_scaling"},
    "nsa_dist/branches.py": BRANCHES,
    "nsa_dist/operators.py": CP,
    "nsa_dist/compiled.py": BRANCHES | {"nsa_dist.operators"},
    "nsa_dist/saved.py": CP | {"nsa_dist.rope_scaling"},
    "nsa_dist/attention.py": ATTENTION,
    "nsa_dist/__init__.py": ATTENTION,
    "nsa_dist/rope_scaling.py": {"torch"},  # its types alone
    "nsa_dist/rope.py": CP | {"nsa_dist.rope_scaling"},
    "nsa_dist/layer.py": INFERENCE,
    "nsa_dist/inference": INFERENCE,
    "nsa_dist/convert": INFERENCE | {"nsa_dist.convert"},
    "nsa_dist/mcore": MCORE,
    "nsa_dist/train": TRAIN,
    "nsa_dist/planner": PLANNER,
    "nsa_dist/bench": BENCH,
    "launchers/nsa_launch": LAUNCH,
}
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single", "broadcast",
    "broadcast_object_list", "barrier", "send", "recv", "isend", "irecv", "batch_isend_irecv", "gather", "scatter",
    "gather_object", "scatter_object_list", "reduce",
}  # fmt: skip


def sources(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def own_sources(place: str) -> set[Path]:
    """Those of a storey, without the rooms inside it that are storeys of their own."""
    inner = [other for other in STOREYS if other.startswith(f"{place}/")]
    return set(sources(place)).difference(*map(sources, inner))


def imported(path: Path) -> set[str]:
    """Modules a file imports, by absolute name; the names of `from x import y` count as `x` only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path.relative_to(ROOT)} reaches out of its package by a relative import"
    return names


def allowed(name: str, may_import: set[str]) -> bool:
    parts = name.split(".")
    prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if parts[0] == "nsa_dist":  # `nsa_dist` alone does not open the storeys inside of it
        return name in may_import or bool((prefixes - {"nsa_dist"}) & may_import)
    return parts[0] not in THIRD_PARTY | {"nsa_kernels", "nsa_launch"} or parts[0] in may_import


def test_every_source_file_has_a_storey():
    covered = {path for place in STOREYS for path in sources(place)}
    found = {path for root in ("nsa_dist", "kernels/nsa_kernels", "launchers/nsa_launch") for path in sources(root)}
    assert found == covered


@pytest.mark.parametrize(("place", "may_import"), STOREYS.items(), ids=STOREYS.keys())
def test_imports_only_from_below(place, may_import):
    for path in own_sources(place):
        wrong = {name for name in imported(path) if not allowed(name, may_import)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which lies above it or is not its to use"


def test_only_the_command_line_stands_on_the_kernels_benchmark():
    """It looks up, at the layer; who imported it from below would stand on the storeys above."""
    bench = "kernels/nsa_kernels/bench"
    for place in STOREYS.keys() - {bench, "launchers/nsa_launch"}:
        for path in own_sources(place):
            wrong = {name for name in imported(path) if name.startswith("nsa_kernels.bench")}
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which measures what lies above it"


def modules() -> dict[str, Path]:
    """Every source file by its module's name; a package goes by its own."""
    found = {}
    for root, package in ((".", "nsa_dist"), ("kernels", "nsa_kernels"), ("launchers", "nsa_launch")):
        for path in sources(f"{root}/{package}"):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(path: Path, known: Collection[str]) -> set[str]:
    """Those of the house that a file imports anywhere in it, in functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # a name is a module's, or a module itself
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in known else str(node.module) for name in whole}
    return names & set(known)


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in turn, if there are such."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_circles():
    known = modules()
    found = circle({name: imported_modules(path, known) for name, path in known.items()})
    assert not found, " -> ".join(found)


def test_a_circle_is_found(tmp_path):
    texts = {"a": "import b\n", "b": "def late():\n    from c import x\n", "c": "from a import y\n", "d": "import a\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    imports = {name: imported_modules(tmp_path / f"{name}.py", texts) for name in texts}
    assert set(circle(imports)) == {"a", "b", "c"}
    assert not circle(imports | {"c": set()})


@pytest.mark.parametrize("root", ["nsa_dist", "kernels/nsa_kernels", "launchers/nsa_launch"])
def test_rooms_are_small(root):
    """A folder holds about a dozen modules, so that its listing says what is where."""
    for folder in {path.parent for path in sources(root)}:
        held = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(held) <= MOST_MODULES, f"{folder.relative_to(ROOT)} holds {len(held)} modules; give some a room"
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} is no package; say in it what it holds"


def test_the_rule_catches_what_it_should():
    assert not allowed("ray.train", TRAIN)
    assert not allowed("nsa_dist.mcore.attention", ATTENTION)
    assert not allowed("nsa_dist", CP)
    assert not allowed("nsa_dist.cp.plan", KERNELS)
    assert allowed("nsa_dist.cp.plan", CP)
    assert allowed("torch.nn", KERNELS)
    assert allowed("dataclasses", KERNELS)


def attribute_uses(path: Path) -> set[str]:
    """Dotted names such as `dist.all_reduce` or `os.environ` in a file."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_collectives_live_in_comm_alone():
    modules = {"dist", "torch.distributed"}
    for root in ("nsa_dist", "kernels/nsa_kernels", "launchers/nsa_launch"):
        for path in sources(root):
            if path == ROOT / "nsa_dist/cp/comm.py":
                continue
            tree = ast.parse(path.read_text())
            used = {
                u
                for u in attribute_uses(path)
                if u.rpartition(".")[0] in modules and u.rpartition(".")[2] in COLLECTIVES
            }
            from_import = {
                alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed"
                for alias in node.names
                if alias.name in COLLECTIVES
            }
            assert not used | from_import, f"{path.relative_to(ROOT)} calls {used | from_import}; use nsa_dist.cp.comm"


def test_no_environment_below_the_launchers():
    for root in ("nsa_dist", "kernels"):
        for path in sources(root):
            if "bench" in path.parts:
                continue
            uses = {u for u in attribute_uses(path) if u.startswith(("os.environ", "os.getenv", "os.putenv"))}
            assert not uses, f"{path.relative_to(ROOT)} reads {uses}; take an argument"


def test_no_module_state():
    for root in ("nsa_dist", "kernels/nsa_kernels"):
        for path in sources(root):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not isinstance(node, ast.Global), f"{path.relative_to(ROOT)} rebinds {node.names} of its module"


def test_the_reference_never_calls_a_kernel():
    """Nor, through the contracts that it shares with them, anything of theirs."""
    known = modules()
    names = {name for name in known if name.startswith("nsa_kernels.reference")} | CONTRACTS
    for name in names:
        assert imported_modules(known[name], known) <= names
        assert not any(module.startswith("triton") for module in imported(known[name]))


def test_source_roots_are_not_packages():
    for root in ("kernels", "launchers", "kernels/bench"):
        assert not (ROOT / root / "__init__.py").exists(), f"{root} is a source root; a package there shadows others"
