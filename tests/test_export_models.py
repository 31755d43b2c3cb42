"""Export of torch models: initializers bit for bit, outputs, dynamic batch, older opsets, half weights, and every refusal."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchopt.errors import ConfigError, DataError, FileError, ModelError
from torchopt.export import decode_initializers, export, to_ort
from torchopt.models import ReferenceModel
from torchopt.network.grid import set_grid
from torchopt.quantize import FixedQuantize
from torchopt.runtime import inspect


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.fc = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(4, 5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn(self.stem(image)))
        y = F.hardswish(y + self.depthwise(y))
        return self.fc(self.up(y).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv1d(6, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(F.relu(self.conv(x)).transpose(1, 2))
        return self.head(y.flatten(1)[:, :8])


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


NETS = {"residual": (Residual, (3, 8, 8)), "sequence": (Sequence, (6, 12)), "shuffle": (Shuffle, (4, 6, 6))}


def seeded(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def run(path, *inputs: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {spec.name: x.numpy() for spec, x in zip(opened.get_inputs(), inputs, strict=True)}
    return opened.run(None, feed)[0]


def assert_same_weights(model: nn.Module, path) -> None:
    stored = decode_initializers(path)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            np.testing.assert_array_equal(stored[name], parameter.detach().numpy(), strict=True)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_weights_bit_equal_and_outputs_close_at_any_batch(tmp_path, name, pack) -> None:
    build, shape = NETS[name]
    model, path = seeded(build), tmp_path / "m.onnx"
    export(model, (torch.randn(1, *shape),), path, pack=pack)
    assert_same_weights(model, path)
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        np.testing.assert_allclose(run(path, x), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_inputs_are_named_after_forward_and_the_caller_is_untouched(tmp_path) -> None:
    model = seeded(Residual).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = export(model, (torch.randn(1, 3, 8, 8),), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [v.name for v in graph.input] == ["image"]
    assert [v.name for v in graph.output] == ["output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert result.size_bytes == (tmp_path / "m.onnx").stat().st_size
    assert "Tidy" in result.passes
    assert f"{result.size_bytes:,} bytes" in str(result)


def test_several_outputs_are_numbered(tmp_path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a + b, a - b

    export(Two(), (torch.ones(1, 2), torch.ones(1, 2)), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [v.name for v in graph.input] == ["a", "b"]
    assert [v.name for v in graph.output] == ["output_0", "output_1"]


def test_convolutions_in_three_dimensions_without_bias(tmp_path) -> None:
    """The exporter gives them a bias of zeros, and of a shape that ONNX Runtime refuses when it runs the file."""
    model = nn.Sequential(nn.Conv3d(3, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 4, 6, 6)
    export(model, (x,), tmp_path / "m.onnx")
    opened = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    np.testing.assert_allclose(opened.run(None, {"input": x.numpy()})[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_static_batch(tmp_path) -> None:
    export(seeded(Residual), (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx", dynamic_batch=False)
    dims = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [2, 3, 8, 8]


def test_opset_17_for_old_runtimes(tmp_path) -> None:
    model, x = seeded(Residual), torch.randn(2, 3, 8, 8)
    result = export(model, (x,), tmp_path / "m.onnx", opset=17)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 17
    assert (result.opset, result.packing) == (17, None)
    assert "dense: opset 17 is for older runtimes, in which decoding at load was not measured; pack=True packs" in str(result)
    assert_same_weights(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_packing_on_request_at_any_opset(tmp_path, opset) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(2, 64)
    with torch.no_grad():
        model[0].weight.copy_(torch.where(model[0].weight > 0, 0.1, -0.2))
    dense = export(model, (x,), tmp_path / "d.onnx", opset=opset, pack=False)
    result = export(model, (x,), tmp_path / "m.onnx", opset=opset, pack=True)
    assert [row.codec for row in result.packing.rows] == ["table1"]
    assert result.size_bytes < 0.6 * dense.size_bytes
    assert result.dense_size_bytes == dense.size_bytes
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", x), run(tmp_path / "d.onnx", x))


def test_pack_auto_follows_the_target(tmp_path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(1, 64)
    nn.init.constant_(model[0].weight, 0.5)
    web = export(model, (x,), tmp_path / "w.onnx", target="ort-web")
    assert web.packing is not None
    assert web.size_bytes < web.dense_size_bytes
    dense = export(model, (x,), tmp_path / "o.onnx", target="openvino")
    assert dense.packing is None
    assert "openvino does not read functions inside the model, which decode packed weights" in str(dense)
    assert not onnx.load(tmp_path / "o.onnx").functions


def test_half_weights_take_half_the_file_and_keep_float_ends(tmp_path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)))
    x = torch.randn(2, 128)
    full = export(model, (x,), tmp_path / "f.onnx", pack=False)
    half = export(model.half(), (x.half(),), tmp_path / "h.onnx", pack=False)
    assert half.size_bytes < 0.53 * full.size_bytes
    assert "HalfWeights" in half.passes
    assert onnx.load(tmp_path / "h.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    model = model.float()
    assert_same_weights(model, tmp_path / "h.onnx")
    np.testing.assert_allclose(run(tmp_path / "h.onnx", x), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- a baked quantized model
def snapped(layer: nn.Module) -> nn.Module:
    weight = layer.weight.data
    scale = weight.flatten(1).abs().amax(1) / 127
    wide = scale.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight.data = torch.round(weight / wide) * wide
    set_grid(layer, "weight", scale, 8, 0)
    return layer


def fixed(scale: float, zero_point: int) -> FixedQuantize:
    return FixedQuantize(torch.tensor(scale), torch.tensor(zero_point), 0, 255)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q0, self.q1, self.q2, self.q3 = fixed(0.02, 128), fixed(6 / 255, 0), fixed(0.03, 100), fixed(0.05, 60)
        self.q4, self.q5 = fixed(0.02, 60), fixed(0.02, 128)
        self.c1, self.c2 = snapped(nn.Conv2d(3, 16, 3, padding=1)), snapped(nn.Conv2d(16, 16, 3, padding=1, groups=16))
        self.fc = snapped(nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q1(F.relu6(self.c1(self.q0(x))))
        y = self.q3(y + self.q2(self.c2(y)))
        return self.q5(self.fc(torch.flatten(self.q4(F.adaptive_avg_pool2d(y, 1)), 1)))


@pytest.mark.parametrize("opset", [21, 17])
def test_a_quantized_model_runs_wholly_as_integers(tmp_path, opset) -> None:
    model, path, x = seeded(Quantized), tmp_path / "m.onnx", torch.randn(3, 3, 16, 16)
    result = export(model, (x[:1],), path, opset=opset, pack=False)
    placement = inspect(path)
    assert placement.float == []
    assert sorted(placement.integer) == ["c1.weight", "c2.weight", "fc.weight"]
    for kind in ("Clip", "Relu", "Conv", "Gemm", "GlobalAveragePool", "Add", "Shape"):
        assert kind not in placement.kernels
    assert {"IntegerWeights", "GlobalPool", "LateDequantize"} <= set(result.passes)
    assert_same_weights(model, path)
    steps = np.abs(run(path, x) - model(x).detach().numpy()) / 0.02
    assert steps.max() <= 1.001


def test_two_layers_with_equal_codes_decode_to_their_own_values(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).eval()
    for layer, scale in ((model[0], 0.5), (model[2], 0.25)):
        layer.weight.data = torch.eye(4) * scale
        set_grid(layer, "weight", torch.full((4,), scale), 8, 0)
    export(model, (torch.ones(1, 4),), tmp_path / "m.onnx")
    assert_same_weights(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", torch.ones(1, 4)), [[0.125] * 4])


def test_weights_that_left_their_grid_are_refused(tmp_path) -> None:
    model = seeded(Quantized)
    with torch.no_grad():
        model.c1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ModelError, match=r"c1\.weight is not on the integer grid"):
        export(model, (torch.randn(1, 3, 16, 16),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "classes", "shape"), [("resnet8", 10, (3, 32, 32)), ("ds_cnn", 12, (1, 49, 10))])
def test_P7_small_nets_cost_at_most_8_kilobytes_beside_their_weights(tmp_path, kind, classes, shape) -> None:
    torch.manual_seed(0)
    model = ReferenceModel(kind=kind, classes=classes, in_channels=shape[0]).build().eval()
    result = export(model, (torch.randn(1, *shape),), tmp_path / "m.onnx", pack=False)
    data = sum(tensor.numel() * 4 for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert result.size_bytes - data <= 8192


def test_ort_format_with_its_list_of_operators(tmp_path) -> None:
    model, x = seeded(Shuffle), torch.randn(1, 4, 6, 6)
    export(model, (x,), tmp_path / "m.onnx")
    files = to_ort(tmp_path / "m.onnx", tmp_path / "m.ort")
    assert files.size_bytes == (tmp_path / "m.ort").stat().st_size
    assert "Conv" in files.operators.read_text()
    assert "m.ort" in str(files)
    np.testing.assert_allclose(run(tmp_path / "m.ort", x), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- refusals
X = (torch.zeros(1, 3),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "ort-x68"}, r"target='ort-x68' is unknown; one of ort-x86, .* did you mean 'ort-x86'"),
        ({"pack": "yes"}, r"pack='yes'; 'auto', True or False is needed"),
        ({"opset": 9}, r"opset=9; 17 to 23 is needed"),
    ],
)
def test_wrong_options(tmp_path, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        export(nn.Linear(3, 2), X, tmp_path / "m.onnx", **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.data[1, 2] = value
    with pytest.raises(ModelError, match=r"0\.weight holds NaN or infinity; export a trained, finite model"):
        export(model, X, tmp_path / "m.onnx")


def test_inputs_that_are_no_tuple(tmp_path) -> None:
    with pytest.raises(DataError, match=r"example_inputs is Tensor; a tuple with the tensors of one call is needed"):
        export(nn.Linear(3, 2), X[0], tmp_path / "m.onnx")


def test_a_model_that_depends_on_data(tmp_path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match=r"Branch cannot be exported to ONNX"):
        export(Branch(), X, tmp_path / "m.onnx")


def test_a_model_that_fixes_its_batch(tmp_path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3) + torch.ones(2, 3)

    with pytest.raises(ModelError, match=r"the model fixes its batch size: export it with dynamic_batch=False"):
        export(Two(), (torch.zeros(2, 3),), tmp_path / "m.onnx")
    export(Two(), (torch.zeros(2, 3),), tmp_path / "m.onnx", dynamic_batch=False)


def test_an_old_file_survives_a_failed_export(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ModelError):
        export(nn.Sequential(nn.Linear(3, 2)), (torch.zeros(1, 4),), path)
    assert path.read_bytes() == b"old"
    with pytest.raises(FileError, match=r"the folder .* does not exist"):
        export(nn.Linear(3, 2), X, tmp_path / "missing" / "m.onnx")


def test_ort_format_of_what_is_no_model(tmp_path) -> None:
    with pytest.raises(FileError, match=r"there is no such file; give an ONNX file"):
        to_ort(tmp_path / "none.onnx", tmp_path / "m.ort")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(FileError, match=r"bad\.onnx: onnxruntime cannot convert it to ORT format"):
        to_ort(tmp_path / "bad.onnx", tmp_path / "m.ort")
    assert not (tmp_path / "m.ort").exists()
