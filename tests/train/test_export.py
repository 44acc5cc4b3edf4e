"""Export: a run of any layout as a plain model, with the logits of Megatron's."""

import json
import shutil

import pytest
import torch

from export_cases import LAYOUTS, compared, trained
from nsa_dist.inference.folder import load_model, save_model
from nsa_dist.train.export.names import plain_weights
from nsa_dist.train.export.run import choose, plain_model
from nsa_dist.train.export.write import write
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from train_cases import records, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_texts(folder / "texts")
    run_ranks(2, trained, folder)
    return folder


@pytest.fixture(scope="module")
def logits(base):
    return compared(base)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_megatron(logits, layout):
    megatron, exported, cached = logits[layout]
    assert megatron.std() > 0.01
    torch.testing.assert_close(exported, megatron, rtol=0, atol=1e-5)
    torch.testing.assert_close(cached, megatron, rtol=0, atol=1e-5)


def test_steps_of_experts_are_recorded(base):
    """Those runs are the only ones with experts that every `make test` trains."""
    for name, layers in {"experts": ["2"], "one expert a token": ["1", "2"], "TP2": []}.items():
        found = records(base, name, "experts")
        assert [r["step"] for r in found] == ([1, 2] if layers else [])
        for record in found:
            assert list(record["layers"]) == layers
            assert 0 <= record["least"] < 1 < record["busiest"] <= 4
            assert record["load_balancing_loss"] > 1


def test_layers_of_multi_token_prediction_stay_in_the_run(base, tmp_path):
    """That run is the only one with them that every `make test` trains."""
    for record in records(base, "predicts ahead"):
        assert len(record["mtp_loss"]) == 2
        assert all(4 < loss < 7 for loss in record["mtp_loss"])
    assert not any("mtp_loss" in record for record in records(base, "CP2"))
    (notice,) = write(base / "predicts ahead", tmp_path / "out").notices
    assert (
        notice == "layers of multi-token prediction (2) stayed in the run: the folder has the model of the next token"
    )
    assert not any("mtp" in name for name, _ in load_model(tmp_path / "out").named_parameters())
    assert write(base / "CP2", tmp_path / "other").notices == ()


def test_a_folder_gives_the_model_back(base, tmp_path):
    model, _ = plain_model(base / "PP2")
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_exported_is_refused(base, tmp_path):
    with pytest.raises(Refused, match=r"no run.json.*give the output_dir of nsa-dist train"):
        choose(OutputDir(tmp_path))
    with pytest.raises(Refused, match="no whole checkpoint of step 1; it has 2: name one of these"):
        choose(OutputDir(base / "CP2"), 1)
    with pytest.raises(ValueError, match=r"mlp.linear_fc1.bias has no place.*export a run of nsa-dist train"):
        plain_weights({"decoder.layers.0.mlp.linear_fc1.bias": torch.zeros(1)})


def test_a_damaged_checkpoint_is_not_exported(base, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(base / "CP2", copy)
    file = max((copy / "checkpoints/step_00000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(Refused, match=rf"{file.name} is not as it was written.*SHA-256"):
        choose(OutputDir(copy))


def test_a_folder_that_is_none_is_refused(base, tmp_path):
    model, _ = plain_model(base / "CP2")
    save_model(model, tmp_path / "out")
    config, weights = tmp_path / "out/config.json", tmp_path / "out/model.safetensors"
    raw = json.loads(config.read_text())
    for change, match in [
        ({"unknown": 1}, "unknown is no key"),
        ({"hidden_size": 8}, "does not hold the model"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"tokenizer": "bpe"}, "must be one of bytes"),
    ]:
        config.write_text(json.dumps({**raw, **change}))
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path / "out")
    config.write_text(json.dumps(raw))
    whole = weights.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"no whole safetensors file.*export the run again"):
            load_model(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors.*nsa-dist export RUN"):
        load_model(tmp_path / "out")
