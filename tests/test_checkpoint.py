"""Saved without pickle, loaded into a freshly built network: plain, prepared, finalized, quantized, shrunken; refused with reasons."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_combine_loops import Net, batch, fit, fresh, rules

import torchopt


def test_prepared_resumes_bit_for_bit(tmp_path):
    model = fit(fresh(), 3)
    torchopt.save(model, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Net())
    fit(model, 3, 3), fit(again, 3, 3)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("technique", ["prune", "cluster", "quantize", "all"])
def test_finalized_gives_the_same_outputs(tmp_path, technique):
    (rule,) = rules()
    if technique != "all":
        rule = torchopt.Rule("*", **{technique: getattr(rule, technique)})
    torch.manual_seed(0)
    final = torchopt.finalize(fit(torchopt.prepare(Net(), [rule], (batch(0)[0],)))).eval()
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Net()).eval()
    x = batch(9)[0]
    torch.testing.assert_close(again(x), final(x), rtol=0, atol=0)
    assert torchopt.network.grid.grids(again).keys() == torchopt.network.grid.grids(final).keys()
    torchopt.export(again, (x,), tmp_path / "m.onnx")
    assert torchopt.verify(again, tmp_path / "m.onnx", [x], progress=False).weights_equal


def test_a_wrapped_model_is_saved_bare(tmp_path):
    model = fit(fresh(), 2)
    torchopt.save(torch.nn.Sequential(model), tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Net())
    torch.testing.assert_close(again.eval()(batch(5)[0]), model.eval()(batch(5)[0]), rtol=0, atol=0)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(torchopt.FileError, match=r"no\.safetensors: there is no such file"):
        torchopt.load(tmp_path / "no.safetensors", Net())
    torchopt.save(Net(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(torchopt.FileError, match="is no whole safetensors file"):
        torchopt.load(tmp_path / "m.safetensors", Net())
    torch.save(Net(), tmp_path / "pickle.pt")
    with pytest.raises(torchopt.FileError, match="is no whole safetensors file"):
        torchopt.load(tmp_path / "pickle.pt", Net())
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(torchopt.FileError, match="was not written by torchopt.save"):
        torchopt.load(tmp_path / "foreign.safetensors", Net())


@pytest.mark.parametrize("theirs", [1, 3])
def test_another_format_is_refused_by_name(tmp_path, theirs):
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", metadata={"torchopt": json.dumps({"format": theirs})})
    message = rf"m\.safetensors: has format {theirs}, this torchopt reads format 2; use the torchopt that wrote it"
    with pytest.raises(torchopt.FileError, match=message):
        torchopt.load(tmp_path / "m.safetensors", Net())


def test_another_architecture_and_no_model(tmp_path):
    torchopt.save(Net(), tmp_path / "m.safetensors")
    with pytest.raises(torchopt.StateError, match="was saved from another architecture than Linear"):
        torchopt.load(tmp_path / "m.safetensors", torch.nn.Linear(3, 2))
    with pytest.raises(torchopt.ConfigError, match="holds tensors, not code; give a freshly built network"):
        torchopt.load(tmp_path / "m.safetensors")


def test_a_state_of_other_rules_is_refused():
    model, other = fresh(), torchopt.prepare(Net(), [torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5))])
    with pytest.raises(torchopt.StateError, match="was made under other rules"):
        other.load_state_dict(model.state_dict())


def test_verbs_in_the_wrong_order():
    with pytest.raises(torchopt.StateError, match=r"step: this Net was not prepared; call torchopt\.prepare"):
        torchopt.step(Net())
    with pytest.raises(torchopt.StateError, match="prepare: the model is prepared already"):
        torchopt.prepare(fresh(), rules())
    with pytest.raises(torchopt.StateError, match="has not seen any data, so no range is known"):
        torchopt.finalize(torchopt.prepare(Net(), [torchopt.Rule("*", quantize=torchopt.Quantize())], (batch(0)[0],)))
    with pytest.raises(torchopt.StateError, match="step was never called, so no mask was ever computed"):
        torchopt.finalize(torchopt.prepare(Net(), [torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5))]))


def test_a_failed_save_leaves_the_old_file(tmp_path):
    torchopt.save(Net(), tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(torchopt.FileError, match="the folder .* does not exist"):
        torchopt.save(Net(), tmp_path / "none" / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
