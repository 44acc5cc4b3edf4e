"""Arguments of Megatron-LM about attention, positions, norms and data: each is decided, a refusal says what to do."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from nsa_dist.mcore import settings
from nsa_dist.mcore.megatron_lm.refusals import HONOURED, IRRELEVANT, REFUSED, decided, refuse_arguments

MEGATRON_LM = os.environ.get("MEGATRON_LM")
OTHER_VALUES = {
    "position_embedding_type": ["learned_absolute", "mrope", "none", "relative"],
    "rope_type": ["yarn"],
    "attention_backend": ["flash"],
    "heterogeneous_layers_config_path": ["file.json"],
    "hybrid_attention_ratio": [0.5],
    "hybrid_mlp_ratio": [0.5],
    "yaml_cfg": ["file.yaml"],
}
# Names that speak of attention, positions, norms or the layout of data.
ABOUT = re.compile(
    r"att(n|ention)|rotary|rope(_|$)|position|(layer|qk|l2).?norm|normalization|mask|qk|softmax|window_|seq_?len|pack"
    r"|(^|_)sft|yarn|mla(_|$)|(^|_)kv|^cp_|context_parallel|spec$|hybrid_|mtp|heterogeneous|legacy_models|document"
    r"|dropout|head_dim|fsdp|yaml|fim_|query_groups|te_precision|optimizer$"
)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in sorted(REFUSED) for value in OTHER_VALUES.get(name, [True])]
)
def test_what_is_refused_names_the_remedy(name, value):
    flag = f"--{name.replace('_', '-')} is {value!r}, but "
    with pytest.raises(ValueError, match=re.escape(flag) + r".* needs .*: .+; .+"):
        refuse_arguments(Namespace(**{name: value}))


def test_an_enumeration_goes_by_its_name():
    refuse_arguments(Namespace(attention_backend=Namespace(name="auto")))
    with pytest.raises(ValueError, match="--attention-backend is 'flash', but"):
        refuse_arguments(Namespace(attention_backend=Namespace(name="flash")))


def test_what_is_accepted():
    refuse_arguments(Namespace())  # arguments of another version
    for name, refusal in REFUSED.items():
        for value in refusal.accepted:
            refuse_arguments(Namespace(**{name: value}))
    refuse_arguments(Namespace(spec=["nsa_dist.mcore", "nsa_layer_spec"]))
    refuse_arguments(Namespace(optimizer="adam", muon_split_qkv=True))
    refuse_arguments(Namespace(optimizer="muon", muon_split_qkv=False))


@pytest.mark.parametrize("optimizer", ["muon", "dist_muon", "adaptive_muon"])
def test_an_optimizer_that_would_cut_the_projection_wrongly(optimizer):
    with pytest.raises(ValueError, match="write --muon-no-split-qkv"):
        refuse_arguments(Namespace(optimizer=optimizer, muon_split_qkv=True))


def test_labels_that_would_be_shifted_wrongly():
    given = {"mtp_num_layers": 1, "context_parallel_size": 2, "dataloader_inter_document_masking": True}
    with pytest.raises(ValueError, match=r"Megatron-core shifts labels as if.*leave one of the three out"):
        refuse_arguments(Namespace(**given))
    for name, value in {"mtp_num_layers": None, "context_parallel_size": 1}.items():
        refuse_arguments(Namespace(**{**given, name: value}))
    refuse_arguments(Namespace(**{**given, "dataloader_inter_document_masking": False}))


def test_no_argument_is_decided_twice():
    counts = Counter([*REFUSED, *(name for group in (*HONOURED.values(), *IRRELEVANT.values()) for name in group)])
    assert not [name for name, count in counts.items() if count > 1]
    # Both refuse it: Megatron-LM takes another class of configuration before the fields are looked at.
    assert decided() & settings.decided() <= {"multi_latent_attention", "attention_backend"}


NAMES = """
import argparse, json, sys, typing
typing.override = getattr(typing, "override", lambda function: function)
from nsa_dist.mcore.cpu import megatron_on_cpu
with megatron_on_cpu():
    from megatron.training.arguments import add_megatron_arguments
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(json.dumps([action.dest for action in parser._actions]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    MEGATRON_LM is None and find_spec("megatron.training") is None,
    reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout runs this",
)
def test_every_argument_of_megatron_lm_is_decided(tmp_path):
    path = os.pathsep.join(filter(None, [MEGATRON_LM, str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", NAMES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"position_embedding_type", "seq_length"} <= names
    undecided = {name for name in names if ABOUT.search(name)} - decided() - settings.decided()
    assert not undecided, f"nobody decided what NSA layers make of {sorted(undecided)}: see refusals.py"
