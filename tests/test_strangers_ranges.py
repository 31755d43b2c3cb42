"""Ranges and equalization on networks that nobody tuned them for: gates, tied weights, outputs of different scales."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize import ActivationQuantizer
from torchopt.quantize.calibration import output_error
from torchopt.quantize.calibration.agreement import errors, largest_part

equalize = importlib.import_module("torchopt.quantize.corrections.equalize")
ROWS = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def quantized(net: nn.Module, x: torch.Tensor, **config: object) -> nn.Module:
    ready = torchopt.prepare(net.eval(), [Rule("*", quantize=Quantize(**config))], (x[:1],))
    return torchopt.finalize(torchopt.calibrate(ready, list(x.split(16)), progress=False)).eval()


@torch.no_grad()
def decibels(net: nn.Module, other: nn.Module, x: torch.Tensor) -> list[float]:
    wanted, given = net(x), other(x)
    pairs = [(wanted, given)] if isinstance(wanted, torch.Tensor) else zip(wanted, given, strict=True)
    return [10 * math.log10(float(a.var() / (a - b).square().mean())) for a, b in pairs]


class Gated(nn.Module):
    """A linear unit whose gates are closed for most inputs, three of them open."""

    def __init__(self, gate=torch.sigmoid) -> None:
        super().__init__()
        self.first, self.both, self.head, self.gate = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 10), gate
        self.both.weight.data[32:] *= 2
        self.both.bias.data[32:] = -12
        self.both.bias.data[32:35] = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.both(torch.relu(self.first(x))).chunk(2, -1)
        return self.head(value * self.gate(gate))


class Through(nn.Module):
    """A function between two layers, on values that lie on both sides of 0, most of them far below."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)
        self.norm.bias.data[:] = torch.where(torch.arange(16) % 4 == 0, 8.0, -8.0)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self.norm(self.first(x))))


class Two(nn.Module):
    """Two outputs, one of which is a thousand times the other; each reads half of the channels, the small one the quiet half."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.loud, self.quiet = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.trunk[2].weight.data[:8] *= 30
        self.loud.weight.data *= 1000
        self.loud.weight.data[:, :8] = 0
        self.quiet.weight.data[:, 8:] = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.trunk(x)
        return self.loud(h), self.quiet(h)


FUNCTIONS = {
    "hardswish": F.hardswish,
    "elu": F.elu,
    "gelu": F.gelu,
    "maximum": lambda a: torch.maximum(a, torch.tanh(a)),
}


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid])
def test_a_gate_that_is_closed_for_most_inputs_is_not_opened_by_clipping(gate):
    net = Gated(gate)
    auto, extremes = (decibels(net, quantized(net, ROWS, observer=o), ROWS)[0] for o in ("auto", "minmax"))
    assert extremes > 25
    assert auto >= extremes - 0.3  # 12 dB where first order alone decided


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_flat_on_one_side(name):
    net = Through(FUNCTIONS[name])
    auto, extremes = (decibels(net, quantized(net, PICTURES, observer=o), PICTURES)[0] for o in ("auto", "minmax"))
    assert auto >= extremes - 0.3


def test_a_small_output_counts_as_much_as_a_large_one():
    net = Two()
    auto, extremes = (decibels(net, quantized(net, PICTURES, observer=o), PICTURES) for o in ("auto", "minmax"))
    assert extremes[1] > 30
    assert all(a >= e - 0.3 for a, e in zip(auto, extremes, strict=True))  # 15 dB in the second where their sum decided


def test_a_choice_of_ranges_that_spoils_the_outputs_is_taken_back(monkeypatch):
    net = Gated()
    monkeypatch.setattr(output_error, "mse_range", lambda histogram, levels: (-0.01, 0.01))  # a planted fault
    ready = torchopt.prepare(net.eval(), [Rule("*", quantize=Quantize())], (ROWS[:1],))
    torchopt.calibrate(ready, [ROWS], progress=False)
    found = [m for m in ready.modules() if isinstance(m, ActivationQuantizer) and not m.fixed]
    assert found
    assert all(float(m.max_val) > 0.01 for m in found)


def test_errors_count_outputs_apart_and_infinities_where_they_belong():
    mask, other = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    assert errors([[mask]], [[mask + 1]]) == [1.0]
    assert errors([[mask]], [[other]]) == [math.inf]
    assert errors([[torch.tensor([1, 2])], [torch.tensor([1, 2])]], [[torch.tensor([1, 3])], [torch.tensor([1, 2])]]) == [0.25]


def test_halving_finds_all_that_stand_together():
    assert largest_part(list(range(20)), lambda part: not {3, 17} & set(part)) == [n for n in range(20) if n not in (3, 17)]
    assert largest_part([1, 2, 3, 4], lambda part: 4 not in part, trials=2) == [1, 2]


# --- equalization ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Linear layers or convolutions, two of which share something; the channels of the first are unequal."""

    def __init__(self, what: str) -> None:
        super().__init__()
        unequal = torch.logspace(-1.5, 0.5, 16)
        if what in ("linear", "autoencoder"):
            self.stem, self.one, self.other, self.head = nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        else:
            self.stem, self.one, self.other = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
            self.head = nn.Conv2d(16, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)] if what == "batch norm" else [nn.Identity()] * 2)
        scaled = self.norms[0] if what == "batch norm" else self.one
        scaled.weight.data *= unequal.reshape(-1, *[1] * (scaled.weight.dim() - 1))
        scaled.bias.data = torch.randn(16) * unequal
        if what in ("linear", "convolution"):
            self.other.weight = self.one.weight
        elif what == "bias":
            self.other.bias = self.one.bias
        elif what == "batch norm":
            self.norms[1].weight, self.norms[1].bias = self.norms[0].weight, self.norms[0].bias
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(self.norms[0](self.one(h)))
        h = torch.relu(self.norms[1](self.other(h)))
        return F.linear(h, self.stem.weight.T) if self.what == "autoencoder" else self.head(h)


TIED = ["linear", "convolution", "bias", "batch norm", "autoencoder"]


@pytest.mark.parametrize("what", TIED)
def test_what_others_read_is_not_scaled(what):
    net, x = Tied(what).eval(), ROWS if what in ("linear", "autoencoder") else PICTURES
    scaled, plain = (decibels(net, quantized(net, x, observer="minmax", equalize=e), x)[0] for e in (True, False))
    assert plain > 25
    assert scaled >= plain - 0.3  # −1 to 5 dB where shared weights were scaled


def equalized(net: nn.Module, x: torch.Tensor) -> tuple[int, float]:
    """How many groups were scaled, and how far the float outputs went."""
    ready = torchopt.prepare(net.eval(), [Rule("*", quantize=Quantize())], (x[:1],)).eval()
    with torch.no_grad():
        count = equalize.equalize(ready, [((x,), {})])
        for module in ready.modules():
            if hasattr(module, "rounding"):
                module.rounding = False
        before, after = net(x), ready(x)
    return count, float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("what", TIED[:4])
def test_equalization_that_scales_a_shared_weight_is_seen(what, monkeypatch):
    x = ROWS if what == "linear" else PICTURES
    known, _ = equalized(Tied(what), x)
    monkeypatch.setattr(equalize, "read_elsewhere", lambda model: set())  # a planted fault: nobody looks who else reads
    count, moved = equalized(Tied(what), x)
    assert count >= known
    assert moved < 1e-4  # the groups that broke the network were put back
