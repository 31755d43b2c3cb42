"""Networks that torch.ao has quantized: every form gives the same integers, in a file that runs on integers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchopt
from torchopt.errors import ModelError
from torchopt.network.grid import grids

pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as ao
    from torch.ao.nn.quantized import FloatFunctional
    from torch.ao.quantization import quantize_fx

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.sin(torch.arange(4 * 3 * 64, dtype=torch.float32)).reshape(4, 3, 8, 8)
ROWS = torch.sin(torch.arange(2 * 6 * 16, dtype=torch.float32)).reshape(2, 6, 16)


class Convolutions(nn.Module):
    """A convolution with its norm, a depthwise one, sums, products, a concatenation, a mean, a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.act = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish()
        qnnpack = torch.backends.quantized.engine == "qnnpack"  # whose relu6 is at fault, see below
        self.clip = nn.ReLU(inplace=True) if qnnpack else nn.ReLU6(inplace=True)
        self.pool, self.head, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5), nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.clip(self.norm(self.stem(x)))
        y = y + self.act(self.depthwise(y))
        y = torch.cat([y, y * 2], 1)
        return torch.sigmoid(self.last(self.head(self.pool(y).flatten(1))))


class Encoder(nn.Module):
    """Attention written out, with a layer called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(8, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = self.out(torch.softmax(q @ k.transpose(1, 2) / 4.0, -1) @ v) + x
        return F.linear(F.gelu(y), self.weight)


class Rarer(nn.Module):
    """A transposed convolution, a norm by itself, layers as functions, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.leaky, self.norm = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.LeakyReLU(0.1), nn.BatchNorm2d(4)
        self.drop, self.weight = nn.Dropout(0.5), nn.Parameter(torch.randn(4, 2, 3, 3) / 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.leaky(self.up(x)))
        y = F.relu(F.conv2d(y, self.weight, None, (2, 2), (1, 1), (1, 1), 2))
        return self.head(self.drop(y).mean([2, 3]))


class Eager(nn.Module):
    """As torch.ao's eager mode wants it: stubs, and sums by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.sum = ao.QuantStub(), ao.DeQuantStub(), FloatFunctional()
        self.stem, self.relu, self.body, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.stem(self.enter(x)))
        return self.leave(self.head(self.sum.add(y, self.body(y)).mean([2, 3])))


@pytest.fixture(params=["x86", "fbgemm", "qnnpack"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.quantized.engine
    if request.param not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {request.param}")
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


def _prepared(kind: type[nn.Module], x: torch.Tensor, backend: str, *, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if train:
        prepared = quantize_fx.prepare_qat_fx(kind().train(), ao.get_default_qat_qconfig_mapping(backend), (x,))
    else:
        prepared = quantize_fx.prepare_fx(kind().eval(), ao.get_default_qconfig_mapping(backend), (x,))
    prepared(x)
    return prepared.eval()


def _same(name: str) -> Callable[[nn.Module], nn.Module]:
    return {"prepared": lambda m: m, "converted": quantize_fx.convert_fx, "reference": quantize_fx.convert_to_reference_fx}[name]


def _codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: grid.codes(model.get_parameter(name)) for name, grid in grids(model).items()}


def _by_file(model: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    torchopt.export(model, (x,), path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(("form", "train"), [("prepared", False), ("prepared", True), ("converted", True), ("reference", False)])
def test_every_form_of_fx_has_the_integers_of_the_reference(form: str, train: bool, backend: str, tmp_path: Path) -> None:
    prepared = _prepared(Convolutions, IMAGES, backend, train=train)
    reference = quantize_fx.convert_to_reference_fx(copy.deepcopy(prepared))
    ours = torchopt.from_torch_ao(_same(form)(copy.deepcopy(prepared)), (IMAGES,))
    right = reference(IMAGES)
    step = 1 / 256  # of a sigmoid's grid
    assert (
        float((ours(IMAGES) - right).abs().max()) <= 3 * step * 1.001
    )  # each value is one step away at most; five of them reach a norm
    for name, codes in _codes(ours).items():
        layer = reference.get_submodule(name.removesuffix(".weight"))
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        torch.testing.assert_close(codes, layer.get_quantized_weight().int_repr(), rtol=0, atol=0)
    assert len(_codes(ours)) == 3
    torchopt.save(ours, tmp_path / "m.safetensors")
    loaded = torchopt.load(tmp_path / "m.safetensors", Convolutions().eval())
    torch.testing.assert_close(_codes(loaded), _codes(ours), rtol=0, atol=0)
    torch.testing.assert_close(loaded(IMAGES), ours(IMAGES), rtol=0, atol=step * 1.001)  # sums in another memory format
    assert float((_by_file(ours, IMAGES, tmp_path / "m.onnx") - right).abs().max()) <= 4 * step * 1.001
    assert len(torchopt.inspect(tmp_path / "m.onnx").integer) == 3


@pytest.mark.parametrize("form", ["prepared", "converted", "reference"])
def test_an_encoder_with_a_layer_as_a_function(form: str, tmp_path: Path) -> None:
    prepared = _prepared(Encoder, ROWS, "x86")
    right = quantize_fx.convert_to_reference_fx(copy.deepcopy(prepared))(ROWS)
    ours = torchopt.from_torch_ao(_same(form)(prepared), (ROWS,))
    assert len(_codes(ours)) == 3
    assert float((ours(ROWS) - right).abs().max()) < 0.03 * float(right.abs().max())
    assert float((_by_file(ours, ROWS, tmp_path / "m.onnx") - right).abs().max()) < 0.03 * float(right.abs().max())


@pytest.mark.parametrize("form", ["prepared", "converted", "reference"])
def test_rarer_layers(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fbgemm: torch's x86 engine transposes convolutions of inputs with a zero point 100 steps off, which is refused."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no fbgemm")
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")
    torch.manual_seed(0)
    mapping = ao.get_default_qconfig_mapping("qnnpack")  # one scale a weight, as transposed convolutions want it
    prepared = quantize_fx.prepare_fx(Rarer().eval(), mapping, (IMAGES,))
    prepared(IMAGES)
    right = quantize_fx.convert_to_reference_fx(copy.deepcopy(prepared))(IMAGES)
    ours = torchopt.from_torch_ao(_same(form)(prepared), (IMAGES,))
    assert len(_codes(ours)) == 3
    assert float((ours(IMAGES) - right).abs().max()) < 0.03 * float(right.abs().max())
    assert float((_by_file(ours, IMAGES, tmp_path / "m.onnx") - right).abs().max()) < 0.03 * float(right.abs().max())


@pytest.mark.parametrize("form", ["prepared", "trained", "converted"])
def test_every_form_of_eager_mode(form: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train = form == "trained"
    fused = (ao.fuse_modules_qat if train else ao.fuse_modules)(Eager().train(train), [["stem", "relu"]])
    fused.qconfig = ao.get_default_qat_qconfig(backend) if train else ao.get_default_qconfig(backend)
    prepared = (ao.prepare_qat if train else ao.prepare)(fused)
    prepared(IMAGES)
    converted = ao.convert(copy.deepcopy(prepared).eval())
    ours = torchopt.from_torch_ao(converted if form == "converted" else prepared, (IMAGES,))
    step, right = float(converted.head.scale), converted(IMAGES)
    assert float((ours(IMAGES) - right).abs().max()) <= 2 * step * 1.001
    for name in ("stem", "body", "head"):
        torch.testing.assert_close(_codes(ours)[f"{name}.weight"], getattr(converted, name).weight().int_repr(), rtol=0, atol=0)
    assert float((_by_file(ours, IMAGES, tmp_path / "m.onnx") - right).abs().max()) <= 2 * step * 1.001


def test_layers_that_round_at_run_time(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.head = nn.LSTM(16, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.memory(x)[0][:, -1])

    theirs = ao.quantize_dynamic(Recurrent(), {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    ours = torchopt.from_torch_ao(theirs, (ROWS,))
    torch.testing.assert_close(_codes(ours)["head.weight"], theirs.head.weight().int_repr(), rtol=0, atol=0)
    assert sorted(_codes(ours))[1:3] == ["memory.weight_hh_l0", "memory.weight_hh_l0_reverse"]
    torch.testing.assert_close(ours(ROWS), theirs(ROWS), rtol=0, atol=0.01)
    torch.testing.assert_close(_by_file(ours, ROWS, tmp_path / "m.onnx"), ours(ROWS), rtol=1e-4, atol=1e-4)


def test_a_value_that_is_off_by_more_than_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = quantize_fx.convert_fx(_prepared(Convolutions, IMAGES, "x86"))
    from torchopt.from_torch_ao import rewrite

    filled = rewrite.chain

    def wrong(name: str, module: nn.Module) -> list[nn.Module]:
        parts = filled(name, module)
        if name == "head":
            parts[0].bias.data += 3 * float(module.scale)
        return parts

    monkeypatch.setattr(rewrite, "chain", wrong)
    with pytest.raises(ModelError, match=r"from_torch_ao: head is 3\.0 steps from what torch\.ao computes"):
        torchopt.from_torch_ao(converted, (IMAGES,))


def test_qnnpack_relu6_of_channels_last_is_a_fault_of_torch_and_is_refused() -> None:
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no qnnpack")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "qnnpack"
    try:
        x = torch.quantize_per_tensor(torch.randn(2, 8, 5, 5), 0.02, 60, torch.quint8).contiguous(
            memory_format=torch.channels_last
        )
        off = float((torch.ops.quantized.relu6(x, False).dequantize() - x.dequantize().clamp(0, 6)).abs().max())
    finally:
        torch.backends.quantized.engine = before
    assert off > 0.1, "torch has mended it: the note in the guide can go"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "nothing of Linear is quantized by torch.ao"),
        (
            lambda: quantize_fx.prepare_fx(Convolutions().eval(), ao.get_default_qconfig_mapping("x86"), (IMAGES,)),
            "has seen no data",
        ),
        (lambda: ao.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), dtype=torch.float16), "the weight of 0 is float16"),
    ],
)
def test_what_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        torchopt.from_torch_ao(make(), (IMAGES,))


def test_export_says_what_to_call(tmp_path: Path) -> None:
    converted = quantize_fx.convert_fx(_prepared(Convolutions, IMAGES, "x86"))
    with pytest.raises(ModelError, match=r"export what torchopt\.from_torch_ao\(model, example_inputs\) returns"):
        torchopt.export(converted, (IMAGES,), tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("form", ["prepared", "converted", "reference"])
def test_networks_of_torchvision(name: str, form: str, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    prepared = quantize_fx.prepare_fx(getattr(torchvision.models, name)().eval(), ao.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    ours = torchopt.from_torch_ao(_same(form)(prepared), (x,))
    torchopt.export(ours, (x,), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert len(placement.integer) == len(_codes(ours)) == {"resnet18": 21, "mobilenet_v2": 53}[name]
    assert np.isfinite(ours(x).detach().numpy()).all()
