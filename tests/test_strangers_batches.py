"""What a batch is to calibration: optional inputs, labels, and inputs that have no samples in front."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Cluster, DataError, Quantize, Rule
from torchopt.quantize.calibration.batch_slices import Whole, in_pieces, kept, part

RULES = [Rule("*", quantize=Quantize())]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Masked(nn.Module):
    """A mean over the places that a mask leaves; the mask may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = torch.relu(self.first(x))
        if mask is not None:
            h = h * mask.unsqueeze(-1)
        return self.head(h.mean(1))


class Graph(nn.Module):
    """Two layers of message passing over nodes and edges (pairs of places)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges[0], edges[1]
        for layer, act in ((self.first, F.relu), (self.second, lambda x: x)):
            h = layer(nodes)
            nodes = act(h + torch.zeros_like(h).index_add(0, target, h[source]))
        return nodes


def decibels(net: nn.Module, other: nn.Module, *inputs: torch.Tensor) -> float:
    with torch.no_grad():
        wanted, given = net(*inputs), other(*inputs)
    return 10 * math.log10(float(wanted.var() / (given - wanted).square().mean()))


def masked(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 20 * torch.randn(count, 5, 6), (torch.rand(count, 5) > 0.8).float() / 20


def test_an_optional_input_of_the_example_is_an_input_of_the_batches():
    net, x, mask = Masked().eval(), *masked(32)
    label = torch.zeros(32, dtype=torch.int64)
    found = []
    for batch in ((x, mask), (x, mask, label), {"x": x, "mask": mask}):
        ready = torchopt.calibrate(torchopt.prepare(net, RULES, (x[:1], mask[:1])), [batch], progress=False)
        found.append(torchopt.finalize(ready).eval())
        assert decibels(net, found[-1], x, mask) > 35  # the mask was taken for the label, and the call for one without
    assert torch.equal(found[0](x, mask), found[1](x, mask))
    plain = torchopt.calibrate(torchopt.prepare(net, RULES, (x[:1],)), [(x, label)], progress=False)
    assert decibels(net, torchopt.finalize(plain).eval(), x) > 35


def test_one_shot_takes_gradients_of_calls_with_the_optional_input():
    net, x, mask = Masked().eval(), *masked(16)
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(len(given)))
    rule = Rule("*", cluster=Cluster(n_clusters=4, importance="fisher"))
    torchopt.one_shot(net, [rule], [(x, mask)], example_inputs=(x[:1], mask[:1]), progress=False)
    assert set(seen) == {2}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            lambda x, mask: (x, torch.zeros(len(x), dtype=torch.int64)),
            r"entry 1 of batch 0 is int64 of shape \[8\].*float32 of shape \[1, 5\]",
        ),
        (lambda x, mask: (x,), r"has 1 entries; the example inputs that the model was prepared with are 2"),
        (lambda x, mask: (x, mask[0]), r"entry 1 of batch 0 is float32 of shape \[5\]"),
    ],
)
def test_a_batch_that_does_not_fit_the_example_is_named(batch, message):
    x, mask = masked(8)
    ready = torchopt.prepare(Masked(), RULES, (x[:1], mask[:1]))
    with pytest.raises(DataError, match=message):
        torchopt.calibrate(ready, [batch(x, mask)], progress=False)


def test_a_prepared_model_with_optional_inputs_is_saved_and_loaded(tmp_path):
    x, mask = masked(8)
    ready = torchopt.calibrate(torchopt.prepare(Masked(), RULES, (x[:1], mask[:1])), [(x, mask)], progress=False)
    torchopt.save(ready, tmp_path / "m.safetensors")
    assert torch.equal(torchopt.load(tmp_path / "m.safetensors", Masked()).eval()(x, mask), ready.eval()(x, mask))


@pytest.mark.parametrize("count", [200, 2])
def test_a_graph_has_no_samples_in_front(count):
    net, nodes = Graph().eval(), torch.randn(count, 6)
    edges = torch.randint(0, count, (2, 3 * count))
    ready = torchopt.prepare(net, RULES, (nodes[:50], edges[:, :60] % min(50, count)))
    final = torchopt.finalize(torchopt.calibrate(ready, [(nodes, edges)] * 2, progress=False)).eval()
    assert decibels(net, final, nodes, edges) > 30  # IndexError: 128 of the nodes, all of the edges


def test_inputs_are_cut_as_the_example_shows():
    call = ((torch.zeros(6, 2), torch.zeros(6, 3)), {})
    add = lambda x, y: x.sum(1) + y.sum(1)
    model = nn.Module()
    model.forward = add
    for lengths, sizes in (((1, 1), [4, 2]), ((1, 6), [6]), ((), [4, 2])):
        pieces = next(in_pieces(model, iter([call]), lengths))
        assert [len(args[0]) for args, _ in pieces] == sizes


def test_whole_calls_are_not_cut():
    call = (Whole((torch.zeros(50, 2), torch.zeros(2, 9))), {})
    assert part(call, 0, 2) is call
    assert kept([call, call], 60) == [call, call]
