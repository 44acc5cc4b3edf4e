"""The public names of nsa_kernels: each the twin of a reference function, imported when it is first used."""

import inspect
import subprocess
import sys

import pytest

import nsa_kernels
from nsa_kernels import cpu, reference

CONTRACT = [
    "compress_mean",
    "compress_mlp",
    "compress_mlp_pair",
    "select_blocks",
    "combine",
    "gate_deltas",
    "sum_branches",
    "merge",
    "compressed_attention",
    "selected_attention",
    "window_attention",
    "compressed_attention_backward",
    "selected_attention_backward",
    "window_attention_backward",
]


@pytest.mark.parametrize("module", [nsa_kernels, cpu], ids=["triton", "cpu"])
@pytest.mark.parametrize("name", CONTRACT)
def test_signature_is_the_references(name, module):
    """The reference's parameters, in order and of the same kind; a kernel may add keyword options with defaults."""
    actual = list(inspect.signature(getattr(module, name)).parameters.values())
    expected = list(inspect.signature(getattr(reference, name)).parameters.values())
    for ours, theirs in zip(actual, expected, strict=False):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)
    assert len(actual) >= len(expected)
    for option in actual[len(expected) :]:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", nsa_kernels.__all__)
def test_importing_its_module_does_not_hide_a_function(name):
    getattr(nsa_kernels, name)
    assert inspect.isfunction(getattr(nsa_kernels, name))


@pytest.mark.parametrize("module", [nsa_kernels, cpu, reference], ids=["triton", "cpu", "reference"])
def test_the_contract_is_what_is_public(module):
    assert sorted(module.__all__) == sorted(CONTRACT)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="its public names are combine"):
        nsa_kernels.flash_attention  # noqa: B018


def test_the_reference_needs_no_triton():
    script = "import sys; sys.modules['triton'] = None; import nsa_kernels.reference; nsa_kernels.reference.combine"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
