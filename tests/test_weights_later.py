"""Modules that have no quantized layer of their own: what trains is what is finalized, in each mode that rounds their weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.mlp = nn.EmbeddingBag(30, 16, mode="sum"), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, kinds: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.bag(kinds))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.LSTMCell(8, 16), nn.GRUCell(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.a(x)
        return self.head(self.b(h))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = nn.Bilinear(8, 8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pair(x, x.flip(1)).relu())


NETS = {
    "bags": (Bags, lambda: torch.randint(0, 30, (64, 4))),
    "cells": (Cells, lambda: torch.randn(64, 8)),
    "pairs": (Pairs, lambda: torch.randn(64, 8)),
}
WEIGHTS = {"bags": "bag.weight", "cells": "a.weight_ih", "pairs": "pair.weight"}


def trained(name: str, rule: Rule) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, x = NETS[name][0](), NETS[name][1]()
    ready = torchopt.prepare(net, [rule], (x[:1],))
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        ready.train()(x).square().mean().backward()
        optimizer.step()
        torchopt.step(ready)
    return ready.eval(), x


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "rule",
    [
        Rule("*", quantize=Quantize()),
        Rule("*", quantize=Quantize(mode="weight_only", weight_bits=4)),
        Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1)), quantize=Quantize()),
        Rule("*", cluster=Cluster(n_clusters=8), quantize=Quantize(mode="weight_only")),
    ],
    ids=["static", "four bits", "masks", "tables"],
)
def test_prepared_and_finalized_are_equal(name: str, rule: Rule, tmp_path) -> None:
    ready, x = trained(name, rule)
    with torch.no_grad():
        final, expected = torchopt.finalize(ready).eval(), ready(x)
        torch.testing.assert_close(final(x), expected, rtol=0, atol=0)
        for twin in (copy.deepcopy(ready), pickle.loads(pickle.dumps(ready))):
            torch.testing.assert_close(twin.eval()(x), expected, rtol=0, atol=0)
        torchopt.save(ready, tmp_path / "m.pt")
        torch.testing.assert_close(torchopt.load(tmp_path / "m.pt", NETS[name][0]()).eval()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETS)
def test_the_weight_is_rounded_while_the_model_runs_and_trains_outside(name: str) -> None:
    ready, _ = trained(name, Rule("*", quantize=Quantize(mode="weight_only", weight_bits=4)))
    weight = dict(ready.named_parameters())[WEIGHTS[name]]
    assert len(weight.unique()) > 100
    final = dict(torchopt.finalize(ready).named_parameters())[WEIGHTS[name]]
    rows = final.flatten(1) if name != "bags" else final
    assert max(len(row.unique()) for row in rows) <= 15
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_a_projected_lstm_is_refused_by_name(tmp_path) -> None:
    net = nn.Sequential(nn.Identity(), nn.LSTM(4, 8, proj_size=2))
    with pytest.raises(torchopt.ModelError, match=r"export: 1: nn.LSTM\(proj_size=2\) has no form in ONNX"):
        torchopt.export(net, (torch.randn(3, 2, 4),), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
