"""Subclasses of torch's layers with a forward of their own are what they compute: integers, folded batch norms, statistics that follow."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.network.core_layer import described, plain
from torchopt.network.grid import grids
from torchopt.quantize.layers.modules import Fused

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
STATIC = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]


class NormAct(nn.BatchNorm2d):
    """Normalizes and activates in one forward, as timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class ConvSame(nn.Conv2d):
    """Pads by what it is given, as TensorFlow's convolutions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.size()[-2:]
        kernel = self.weight.shape[-2:]
        down = max((math.ceil(h / self.stride[0]) - 1) * self.stride[0] + kernel[0] - h, 0)
        right = max((math.ceil(w / self.stride[1]) - 1) * self.stride[1] + kernel[1] - w, 0)
        x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Written(nn.Linear):
    """Calls itself as a function, and writes into the result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(F.linear(x, self.weight, self.bias))


def test_a_result_that_is_written_into_is_the_layers():
    torch.manual_seed(0)
    model, x = nn.Sequential(Written(8, 8), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(8, 4)), torch.randn(16, 8)
    ready = torchopt.prepare(model, STATIC, (x,))
    assert isinstance(ready.get_submodule("0").act, nn.ReLU)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x,), progress=False)
    torch.testing.assert_close(final(x), model(x), rtol=0, atol=0.05 * float(model(x).detach().abs().max()))


class Scaled(nn.Linear):
    """Computes more than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Stranger(nn.Module):
    """All of them, one of the norms before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = ConvSame(3, 8, 3, stride=2, bias=False), NormAct(8)
        self.bn2, self.conv = NormAct(8, nn.Hardswish), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = Scaled(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.stem(x))
        y = y + self.conv(self.bn2(y))
        return self.head(y.mean((2, 3)))


def _stranger() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = Stranger()
    for name in ("bn1", "bn2"):
        norm = model.get_submodule(name)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(16, 3, 17, 17)


def test_subclasses_are_integer_layers_with_their_batch_norms_folded():
    model, x = _stranger()
    ready = torchopt.prepare(model, STATIC, (x[:1],))
    layers = {name: m for name, m in ready.named_modules() if isinstance(m, Fused)}
    assert sorted(layers) == ["bn2", "conv", "head", "stem"]
    assert [layers[name].bn is not None for name in ("stem", "bn2")] == [True, True]
    assert isinstance(layers["stem"].act, nn.ReLU)
    assert ready.torchopt_state.skipped == []


@torch.no_grad()
def test_a_network_of_subclasses_keeps_its_accuracy_and_is_one_file_of_integers(tmp_path: Path):
    model, x = _stranger()
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False).eval()
    wanted = model.eval()(x)
    assert float(wanted.var() / (final(x) - wanted).square().mean()) > 10**2.8  # 28 dB
    assert sorted(grids(final)) == ["bn2.weight", "conv.weight", "head.weight", "stem.weight"]
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).within_one_step >= 0.999
    assert torchopt.inspect(tmp_path / "m.onnx").float == []


def test_running_statistics_of_subclasses_follow_training():
    model, x = _stranger()
    ready = torchopt.prepare(model, STATIC, (x[:1],)).train()
    means = [ready.get_submodule(path).running_mean.clone() for path in ("stem.bn", "bn2.bn")]
    ready(x)
    model.train()(x)
    for path, name, before in zip(("stem.bn", "bn2.bn"), ("bn1", "bn2"), means, strict=True):
        after = ready.get_submodule(path).running_mean
        assert float((after - before).abs().max()) > 0.01
        torch.testing.assert_close(
            after, model.get_submodule(name).running_mean, rtol=0, atol=0.02
        )  # they moved on rounded values
        assert int(ready.get_submodule(path).num_batches_tracked) == 1


@torch.no_grad()
def test_a_finalized_network_of_subclasses_loads_over_a_fresh_one(tmp_path: Path):
    model, x = _stranger()
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False).eval()
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Stranger()).eval()
    torch.testing.assert_close(again(x), final(x), rtol=0, atol=0)


@torch.no_grad()
def test_a_prepared_network_of_subclasses_loads_over_a_fresh_one(tmp_path: Path):
    model, x = _stranger()
    ready = torchopt.calibrate(torchopt.prepare(model, STATIC, (x[:1],)), [x], progress=False).eval()
    torchopt.save(ready, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Stranger()).eval()
    torch.testing.assert_close(again(x), ready(x), rtol=0, atol=0)


class Frozen(nn.BatchNorm2d):
    """Never follows the batch, as detection networks want it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def test_a_subclass_that_stays_frozen_in_training_stays_frozen():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(4, 3, 8, 8)
    ready = torchopt.prepare(model, STATIC, (x,)).train()
    before = {name: b.clone() for name, b in ready.named_buffers() if "running" in name}
    ready(x)
    assert len(before) == 2
    for name, buffer in before.items():
        torch.testing.assert_close(ready.get_buffer(name), buffer, rtol=0, atol=0)


class Standardized(nn.Conv2d):
    """The weight is computed in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


def test_a_computed_weight_stays_float_with_its_reason():
    torch.manual_seed(0)
    model, x = nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(4, 3, 8, 8)
    ready = torchopt.prepare(model, STATIC, (x,))
    (left,) = ready.torchopt_state.skipped
    assert left.name == "0"
    assert left.reason.startswith("its forward computes another weight from it in each call (Standardized)")
    assert [name for name, m in ready.named_modules() if isinstance(m, Fused)] == ["2"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, 2, 1, groups=2),
        nn.ConvTranspose1d(4, 6, 3, output_padding=1, stride=2),
        nn.Linear(3, 2),
        nn.BatchNorm3d(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_is_its_class_its_arguments_and_its_tensors(layer: nn.Module):
    name, fields = described(layer)
    again = plain(layer._parameters | layer._buffers, name, fields)
    assert repr(again) == repr(layer)
    assert [id(t) for t in again.state_dict(keep_vars=True).values()] == [
        id(t) for t in layer.state_dict(keep_vars=True).values()
    ]
