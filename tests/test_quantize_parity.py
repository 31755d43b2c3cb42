"""Any small network that a generator can think of: torch with fake quantizers and ONNX Runtime on integers give the same answers."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import torchopt
from torchopt import Quantize, Rule

CHANNELS = 8
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.Hardsigmoid, nn.Identity)


class Residual(nn.Module):
    """x + f(x), then perhaps a ReLU."""

    def __init__(self, inner: nn.Module, relu: bool) -> None:
        super().__init__()
        self.inner, self.act = inner, nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.inner(x))


class Both(nn.Module):
    """Two branches side by side, and a 1×1 convolution back to the width."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other, self.mix = one, other, nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.cat([self.one(x), self.other(x)], 1))


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    """Convolution, perhaps with batch norm, and an activation; width and size stay."""
    kernel, dilation = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2]))
    groups, norm = draw(st.sampled_from([1, 2, CHANNELS])), draw(st.booleans())
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()))
    parts = [layer, nn.BatchNorm2d(CHANNELS)] if norm else [layer]
    return nn.Sequential(*parts, draw(st.sampled_from(ACTIVATIONS))())


@st.composite
def blocks(draw: st.DrawFn) -> nn.Module:
    """One building block."""
    match draw(st.sampled_from(["plain", "residual", "both", "squeeze", "max", "average"])):
        case "residual":
            return Residual(draw(convolutions()), draw(st.booleans()))
        case "both":
            return Both(draw(convolutions()), draw(convolutions()))
        case "squeeze":
            return Squeeze()
        case "max":
            return nn.MaxPool2d(3, 1, 1)
        case "average":
            return nn.AvgPool2d(2, 1)
        case _:
            return draw(convolutions())


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Stem, some blocks, pooling, a linear head; weights and batch-norm statistics from a drawn seed."""
    body = draw(st.lists(blocks(), min_size=2, max_size=5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    pool = nn.AdaptiveAvgPool2d(1) if draw(st.booleans()) else nn.AdaptiveAvgPool2d(2)
    head = nn.Linear(CHANNELS * (1 if pool.output_size == 1 else 4), 10)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.ReLU(), *body, pool, nn.Flatten(), head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def check(model: nn.Module, bits: int, target: str) -> None:
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rule = Rule("*", quantize=Quantize(weight_bits=bits, observer="minmax"))
    final = torchopt.one_shot(model, [rule], [x], example_inputs=(x[:1],), target=target, progress=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torchopt.export(final, (x[:1],), path, target=target)
        verdict = torchopt.verify(final, path, [x], progress=False)
        placement = torchopt.inspect(path)
    assert verdict.weights_equal, verdict.first_difference
    assert verdict.max_steps < 0.01, str(verdict)  # every integer is the same; the last layer adds in float
    assert not placement.float, placement.float


PROFILE = {"deadline": None, "phases": [Phase.generate], "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=15, **PROFILE)
@given(networks(), st.sampled_from([4, 8]))
def test_fifteen_networks_agree_and_run_as_integers(model, bits):
    check(model, bits, "ort-x86")


@pytest.mark.slow
@settings(max_examples=200, **PROFILE)
@given(networks(), st.sampled_from([2, 4, 8]), st.sampled_from(["ort-x86", "ort-x86-avx2"]))
def test_two_hundred_networks_agree_and_run_as_integers(model, bits, target):
    check(model, bits, target)


INGREDIENTS = {
    "stride", "1×1", "3×3", "5×5", "dilated", "grouped", "depthwise", "no bias", "BatchNorm2d", "Residual", "Both", "Squeeze", "MaxPool2d",
    "AvgPool2d", "AdaptiveAvgPool2d", "Linear", *(act.__name__ for act in ACTIVATIONS),
}  # fmt: skip


def ingredients(model: nn.Module) -> set[str]:
    found = {type(module).__name__ for module in model.modules()}
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        found.add(f"{conv.kernel_size[0]}×{conv.kernel_size[0]}")
        named = {"stride": conv.stride[0] > 1, "dilated": conv.dilation[0] > 1, "no bias": conv.bias is None}
        named |= {"depthwise": conv.groups == CHANNELS, "grouped": 1 < conv.groups < CHANNELS}
        found |= {name for name, there in named.items() if there}
    return found


def test_the_family_holds_what_it_should():
    """Of 200 networks as the slow tier draws them, each ingredient is in 20 at least; of 15, as the fast one does, in one."""
    drawn: list[set[str]] = []

    @settings(max_examples=200, **PROFILE)
    @given(networks())
    def draw(model):
        drawn.append(ingredients(model))

    draw()
    for count, least in ((200, 20), (15, 1)):
        times = {name: sum(name in net for net in drawn[:count]) for name in INGREDIENTS}
        assert not {name: n for name, n in times.items() if n < least}
