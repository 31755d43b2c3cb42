"""What masks and tables take is given back from data: against the same without data, exactly as sparse, with exactly K values."""

import threading

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import torchopt
from torchopt import Cluster, Prune, Quantize, Rule, one_shot
from torchopt.compress.in_step import in_step
from torchopt.network.grid import grids

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 3, 10, 10, generator=GENERATOR).cumsum(3) / 3 + 0.5  # neighbours are alike, as in pictures


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10),
    ).eval()  # fmt: skip
    net[1].weight.data.uniform_(-1, 1)  # both signs
    net[1].running_mean.uniform_(-0.5, 0.5)
    return net


NET = network()
WEIGHTS = ("0.weight", "3.weight", "5.weight", "8.weight")


def decibels(small: nn.Module) -> float:
    with torch.no_grad():
        given, wanted = small.eval()(X[32:]), NET(X[32:])
    return float(10 * torch.log10(wanted.var() / (given - wanted).square().mean()))


def small(rule: Rule, data: bool = True) -> nn.Module:
    return one_shot(NET, [rule], list(X[:32].split(8)) if data else None, example_inputs=(X[:1],), progress=False)


@pytest.mark.parametrize("pattern", ["element", "2:4", "block", "channel"])
def test_masks_cost_less_with_data_and_less_still_where_the_solver_chooses_them(pattern):
    options = {"pattern": pattern} if pattern == "2:4" else {"pattern": pattern, "schedule": 0.5}
    options |= {"block_size": (1, 4)} if pattern == "block" else {}
    alone, given, chosen = (
        small(Rule("*", prune=Prune(**options, score=score)), data)
        for score, data in (("magnitude", False), ("magnitude", True), ("hessian", True))
    )
    for name in WEIGHTS:
        zeros = [int((model.state_dict()[name] == 0).sum()) for model in (alone, given, chosen)]
        assert zeros[0] == zeros[1]
        assert abs(zeros[2] - zeros[0]) <= (8 if pattern == "block" else 0)  # the last block of a row is smaller
    better = 0 if pattern == "channel" else 1.5  # an output that is gone is gone
    assert decibels(given) > decibels(alone) + better
    assert decibels(chosen) > decibels(given) - (3 if pattern == "channel" else 0)


def test_tables_cost_less_with_data():
    rule = Rule("*", cluster=Cluster(n_clusters=6))
    given = small(rule)
    assert all(given.state_dict()[name].unique().numel() == 6 for name in WEIGHTS)
    assert decibels(given) > decibels(small(rule, data=False)) + 4


@pytest.mark.parametrize("config", [{"per_channel": True}, {"table_bits": 5}], ids=str)
def test_tables_for_each_channel_and_on_a_grid_cost_less_too(config):
    rule = Rule("*", cluster=Cluster(n_clusters=6, **config))
    assert decibels(small(rule)) > decibels(small(rule, data=False)) + 2


def test_under_8_bits_a_table_is_of_k_integers_and_each_channel_has_a_scale(tmp_path):
    final = small(Rule("*", prune=Prune(schedule=0.5), cluster=Cluster(n_clusters=8), quantize=Quantize()))
    for name in WEIGHTS:
        weight, grid = final.state_dict()[name], grids(final)[name]
        assert grid.codes(weight).unique().numel() <= 8
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert grids(final)["0.weight"].scale.unique().numel() > 8
    path = tmp_path / "model.onnx"
    torchopt.export(final, (X[:1],), path)
    assert torchopt.verify(final, path, [X[:8]]).weights_equal
    torchopt.export(final, (X[:1],), tmp_path / "plain.onnx", pack=False)
    file = onnx.load(tmp_path / "plain.onnx")
    integers = [onnx.numpy_helper.to_array(t) for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len([t for t in integers if t.size > 1 and len(np.unique(t)) <= 8]) >= len(WEIGHTS)


def test_channels_that_differ_a_hundred_times_keep_their_values_under_one_table():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.Identity(), nn.Linear(16, 16)).eval()
    net[0].weight.data *= torch.logspace(-2, 0, 16)[:, None]
    x = torch.randn(64, 32, generator=GENERATOR)
    rule = Rule("0", cluster=Cluster(n_clusters=16), quantize=Quantize())
    final = one_shot(net, [rule], [x], example_inputs=(x[:1],), progress=False)
    weight = final.get_submodule("0").weight.detach()
    before = net[0].weight.detach()
    error = (weight - before).square().sum(1) / before.square().sum(1)
    assert float(error.max()) < 0.05  # one scale for all: 1.0 in the smallest channels
    assert grids(final)["0.weight"].codes(weight).unique().numel() <= 16


def test_zeros_and_tables_of_earlier_rounds_stay():
    shared = small(Rule("*", cluster=Cluster(n_clusters=6)))
    rule = Rule("*", prune=Prune(schedule=0.5))
    both = one_shot(shared, [rule], [X[:32]], progress=False)
    for name in WEIGHTS:
        before, after = shared.state_dict()[name], both.state_dict()[name]
        assert set(after[after != 0].unique().tolist()) <= set(before.unique().tolist())
        assert int((after == 0).sum()) == before.numel() // 2
    more = one_shot(both, [Rule("*", prune=Prune(schedule=0.75, score="hessian"))], [X[:32]], progress=False)
    for name in WEIGHTS:
        assert not bool(more.state_dict()[name][both.state_dict()[name] == 0].any())


def test_it_is_deterministic_and_touches_no_bystander():
    rule = Rule("*", prune=Prune(schedule=0.5), cluster=Cluster(n_clusters=8), quantize=Quantize())
    before = {name: t.clone() for name, t in NET.state_dict().items()}
    one, other = small(rule).state_dict(), small(rule).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    assert all(torch.equal(before[name], t) for name, t in NET.state_dict().items())


def test_the_solver_s_score_needs_data_and_no_training():
    rule = Rule("*", prune=Prune(schedule=0.5, score="hessian"))
    with pytest.raises(torchopt.ConfigError, match=r"0\.weight: score='hessian' needs data"):
        one_shot(NET, [rule], progress=False)
    ready = torchopt.prepare(NET, [rule])
    with pytest.raises(torchopt.StateError, match="found without training, by torchopt.one_shot"):
        torchopt.step(ready)


def test_what_is_not_finite_is_refused_with_the_layer():
    with pytest.raises(torchopt.ModelError, match=r"one_shot: 0\.weight: holds NaN or infinity in what it reads"):
        one_shot(NET, [Rule("*", prune=Prune(schedule=0.5))], [X[:8] * torch.nan], progress=False)


class Branches(nn.Module):
    """Which layers it calls depends on the data; one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(torch.relu(self.a(x))) if float(x.sum()) > 0 else self.b(x)
        return self.last(x)


def test_a_network_that_goes_by_its_data_is_walked_through():
    torch.manual_seed(0)
    net, before = Branches().eval(), threading.active_count()
    calls = [((torch.full((4, 8), sign),), {}) for sign in (1.0, -1.0, 1.0)]
    assert [(layer, len(given)) for layer, given in in_step(net, [net.a, net.b, net.last], calls)] == [
        (net.a, 2), (net.b, 1), (net.last, 3),
    ]  # fmt: skip
    final = one_shot(net, [Rule("*", prune=Prune(schedule=0.5))], [torch.randn(4, 8) for _ in range(4)], progress=False)
    assert int((final.a.weight == 0).sum()) == 32
    walk = in_step(net, [net.a], calls)
    next(walk)
    walk.close()  # left early
    assert threading.active_count() == before
    assert not net.a._forward_pre_hooks


def test_what_a_network_raises_is_raised():
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(in_step(Fails(2, 2), [], [((torch.ones(1, 2),), {})]))
