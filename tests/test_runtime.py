"""Sessions, placement, verification and timing in the real runtime."""

import copy

import numpy as np
import pytest
import torch
from test_combine_loops import Net, batch
from torch import nn

import torchopt
from torchopt.runtime import session

X = batch(0)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float and a wholly quantized file of one network, with their models."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = Net().eval()
    rule = torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5), quantize=torchopt.Quantize())
    small = torchopt.one_shot(net, [rule], [X], example_inputs=(X[:1],), progress=False).eval()
    torchopt.export(net, (X[:1],), folder / "float.onnx", pack=False)
    torchopt.export(small, (X[:1],), folder / "int8.onnx")
    return folder, net, small


def test_float_layers_and_why(files):
    placement = torchopt.inspect(files[0] / "float.onnx")
    assert placement.integer == []
    assert placement.float == ["stem.weight", "body.weight", "head.weight"]
    assert {layer.reason for layer in placement.layers} == {"its weight is float"}
    assert "0 of 3 layers run as integers" in str(placement)


def test_integer_layers(files):
    placement = torchopt.inspect(files[0] / "int8.onnx")
    assert placement.float == []
    assert placement.undecoded == []
    assert [layer.kernel for layer in placement.layers] == ["QLinearConv", "QLinearConv", "QGemm"]
    assert placement.to_dict()["integer"] == ["stem.weight", "body.weight", "head.weight"]


def test_verify_finds_equal_weights_and_close_outputs(files):
    folder, net, small = files
    verdict = torchopt.verify(net, folder / "float.onnx", [X], progress=False)
    assert verdict.weights_equal
    assert verdict.weights_compared == 3
    assert verdict.max_relative < 1e-5
    assert verdict.max_steps is None
    verdict = torchopt.verify(small, folder / "int8.onnx", [X, X], progress=False)
    assert verdict.weights_equal
    assert verdict.top1_agreement == 1.0
    assert verdict.samples == 16
    assert verdict.max_steps <= 1.0


def test_verify_names_the_weight_that_differs(files):
    folder, _, small = files

    changed = copy.deepcopy(small)
    with torch.no_grad():
        changed.body.weight[0, 0, 0, 0] += 1.0
    verdict = torchopt.verify(changed, folder / "int8.onnx", [X], progress=False)
    assert not verdict.weights_equal
    assert verdict.first_difference == "body.weight"
    assert "body.weight DIFFERS" in str(verdict)


class Masked(nn.Module):
    """A second input that has a default, as Hugging Face encoders' attention_mask."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, mask=None):
        return self.fc(x if mask is None else x * mask)


def test_verify_names_the_input_that_a_batch_lacks(tmp_path):
    net, x, mask = Masked().eval(), torch.randn(3, 4), torch.ones(3, 4)
    torchopt.export(net, (x[:1], mask[:1]), tmp_path / "m.onnx", pack=False)
    with pytest.raises(torchopt.DataError, match="exported with mask, which a batch does not give; give each batch as a dict"):
        torchopt.verify(net, tmp_path / "m.onnx", [(x, mask)], progress=False)
    assert torchopt.verify(net, tmp_path / "m.onnx", [{"x": x, "mask": mask}], progress=False).max_relative < 1e-6


def test_verify_without_data(files):
    with pytest.raises(torchopt.DataError, match="verify: the loader gave no batch"):
        torchopt.verify(files[1], files[0] / "float.onnx", [], progress=False)


def test_nan_outputs_are_refused(files):
    with pytest.raises(torchopt.DataError, match="an output is NaN or infinite"):
        torchopt.verify(files[1], files[0] / "float.onnx", [X * float("nan")], progress=False)


def test_benchmark_compares_with_the_first(files):
    paths = [files[0] / "float.onnx", files[0] / "int8.onnx"]
    timing = torchopt.benchmark(paths, repeats=3, memory=True, progress=False)
    assert timing.rows[0].ratio == 1.0
    assert timing.rows[0].low_ms <= timing.rows[0].latency_ms <= timing.rows[0].high_ms
    assert timing.rows[1].size_bytes == paths[1].stat().st_size
    assert timing.rows[0].peak_bytes > 0
    assert timing.to_dict()["repeats"] == 3
    assert "float.onnx" in str(timing)


def test_bad_files_and_options(files, tmp_path):
    with pytest.raises(torchopt.FileError, match=r"no\.onnx: there is no such file"):
        session(tmp_path / "no.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(torchopt.FileError, match="ONNX Runtime .* refuses it"):
        session(tmp_path / "bad.onnx")
    with pytest.raises(torchopt.ConfigError, match="threads=0; at least 1"):
        session(files[0] / "float.onnx", threads=0)
    with pytest.raises(torchopt.ConfigError, match="benchmark: 0 files"):
        torchopt.benchmark([])


def test_report_of_a_model_in_training_and_of_its_file(files):
    folder, net, _ = files
    ready = torchopt.prepare(
        net, [torchopt.Rule("*", prune=torchopt.Prune(schedule=0.75), cluster=torchopt.Cluster(n_clusters=4))]
    )
    rows = {row.name: row for row in torchopt.report(ready).rows}
    assert rows["body.weight"].sparsity < 0.75
    assert "masked" in rows["body.weight"].techniques
    rows = {row.name: row for row in torchopt.report(folder / "int8.onnx").rows}
    assert rows["body.weight"].sparsity >= 0.5
    assert rows["body.weight"].techniques == ("pruned", "int8")
    assert rows["body.weight"].bytes <= 8 * 8 * 9 + 8 * 4  # a float32 scale for each channel
    np.testing.assert_allclose(rows["stem.weight"].entropy_bits, 4.0, atol=1.5)


@pytest.mark.parametrize(("dtype", "equal"), [(torch.float16, True), (torch.bfloat16, True), (torch.float64, False)])
def test_models_of_other_precisions_are_fed_what_the_file_takes(tmp_path, dtype, equal):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), torch.randn(4, 8, dtype=dtype)
    torchopt.export(model, (x,), tmp_path / "m.onnx")
    verdict = torchopt.verify(model, tmp_path / "m.onnx", [x])
    assert verdict.weights_equal is equal, "float64 weights are rounded to float32 in the file, and verify says so"
    assert verdict.max_relative < {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype]
