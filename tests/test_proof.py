"""After tracing and fusing, the network with rounding off is the float network, in both modes; what is not is refused by name."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.errors import ModelError
from torchopt.network.proof import TOLERANCE, difference, differs, run
from torchopt.quantize import static
from torchopt.quantize.calibration.proving import as_float
from torchopt.quantize.graph import fuse
from torchopt.quantize.layers.float_layers import FusedLinear

STATIC = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]


class Small(nn.Module):
    """Convolution, batch norm, gate, dropout, linear layer: whatever is rewritten on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.gate, self.drop, self.head = nn.Hardswish(), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gate(self.b(F.relu(self.bn(self.a(x)))))
        return self.head(self.drop(y.mean((2, 3))))


def _lively(model: nn.Module) -> nn.Module:
    """Running statistics that are not 0 and 1, where nothing could be seen."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def _data() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
def test_the_prepared_network_without_rounding_is_the_float_one(training: bool):
    model, x = _lively(Small()), _data()
    ready = torchopt.prepare(model, STATIC, (x,))
    apart = difference(run(model, ((x,), {}), training=training), run(ready, ((x,), {}), training=training, under=as_float))
    assert apart < 1e-5 < TOLERANCE


def test_a_proof_leaves_random_state_buffers_and_modes_as_they_were():
    model, x = _lively(Small()).train(), _data()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ready = torchopt.prepare(model, STATIC, (x,))
    ours = copy.deepcopy(ready.state_dict())
    assert differs(model, ready, ((x,), {}), training=True, under=as_float) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert model.training
    assert ready.training
    for was, now in ((before, model.state_dict()), (ours, ready.state_dict())):
        for name, tensor in was.items():
            torch.testing.assert_close(now[name], tensor, rtol=0, atol=0)


def test_a_fusing_rule_that_drops_a_bias_is_caught(monkeypatch: pytest.MonkeyPatch):
    def careless(*args: object) -> object:
        layer = rule(*args)
        if isinstance(layer, FusedLinear):
            layer.bias = None
        return layer

    rule = fuse.fused
    monkeypatch.setattr(fuse, "fused", careless)
    with pytest.raises(
        ModelError, match=r"after fusing, Small with rounding off is not the float network: its outputs differ by"
    ):
        torchopt.prepare(_lively(Small()), STATIC, (_data(),))


def test_a_batch_norm_fused_over_another_axis_is_caught_and_located(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuse, "_over_channels", lambda node, layer: True)
    with pytest.raises(ModelError, match="after fusing, Nodes .* differ by .*, first in what 'b' is given; leave the layers"):
        torchopt.prepare(_lively(Nodes()), STATIC, (torch.randn(4, 6, 8),))


@pytest.mark.parametrize("normed", [True, False])
def test_a_wrong_graph_is_caught_on_an_example_of_zeros(normed: bool, monkeypatch: pytest.MonkeyPatch):
    """A network that needs no graph is quantized layer by layer; batch norm needs one."""

    def careless(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> object:
        traced, leaves = graph_of(model, inputs)
        for node in traced.graph.nodes:
            if node.target is F.relu:
                node.target = F.relu6
        traced.recompile()
        return traced, leaves

    graph_of = static.trace
    monkeypatch.setattr(static, "trace", careless)
    model = nn.Sequential()
    model.a, model.b = nn.Linear(64, 64, bias=False), Big()
    if not normed:
        ready = torchopt.prepare(model, STATIC, (torch.zeros(2, 64),))
        assert [type(ready.get_submodule(p)).__name__ for p in ("a", "b.layer")] == ["FusedRoundedLinear"] * 2
        assert not isinstance(ready, torch.fx.GraphModule)
        return
    model.c = nn.BatchNorm1d(64)
    with pytest.raises(ModelError, match="after tracing, Sequential with rounding off is not the float network"):
        torchopt.prepare(model, STATIC, (torch.zeros(2, 64),))


class Big(nn.Module):
    """A ReLU that lets pass what ReLU6 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.relu(20 * x))


def test_the_first_batch_of_calibration_proves_too():
    model, x = _lively(Chosen()).eval(), _data()
    ready = torchopt.prepare(model, STATIC, (x,))
    with pytest.raises(
        ModelError, match="after preparing, Chosen with rounding off is not the float network: its outputs differ"
    ):
        torchopt.calibrate(ready, [x + 100], progress=False)


class Chosen(Small):
    """What Python decided on the example, and the graph keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * scale_of(x))


def scale_of(x: torch.Tensor) -> float:
    return 1.0 if isinstance(x, torch.fx.Proxy) or float(x.detach().mean()) < 50 else 2.0


class Nodes(nn.Module):
    """A graph net's layer: batch norm over the nodes, not over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.bn(self.a(x))))


@torch.no_grad()
def test_a_batch_norm_over_another_axis_than_the_features_is_not_fused():
    model, x = _lively(Nodes()).eval(), torch.randn(64, 6, 8)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:2],), progress=False)
    wanted = model(x)
    assert float(wanted.var() / (final(x) - wanted).square().mean()) > 10**3.0  # 30 dB; it was -3
    assert sorted(torchopt.network.grid.grids(final)) == ["a.weight", "b.weight"]


class Auxiliary(nn.Module):
    """A second head that training alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor):
        y = F.relu(self.a(x))
        return (self.b(y), self.c(y)) if self.training else self.b(y)


@pytest.mark.parametrize("copies", [False, True])
def test_a_network_with_another_form_in_training_is_calibrated_and_not_trained(copies: bool):
    x = torch.randn(16, 8)
    ready = torchopt.prepare(Auxiliary(), STATIC, (x,))
    ready = copy.deepcopy(ready) if copies else ready
    with pytest.raises(ModelError, match="in training mode, Auxiliary computes something else .*it gives 1 values instead of 2"):
        ready.train()(x)
    torchopt.calibrate(ready, [x], progress=False)
    assert torchopt.finalize(ready).eval()(x).shape == (16, 2)
