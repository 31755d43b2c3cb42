"""Masks, tables and grids on a weight that others read too: the gradient, and what is finalized, are those of all its readers."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt.quantize.layers.modules import Fused

CASES = [
    (mask, table, mode)
    for mask, table, mode in itertools.product((False, True), (False, True), (None, "static", "dynamic", "weight_only"))
    if mask or table or mode
]


class TiedHead(nn.Module):
    """The embedding's weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.middle = nn.Linear(16, 16)

    def forward(self, x):
        hidden = torch.relu(self.middle(self.embedding(x)))
        return F.linear(hidden, self.embedding.weight).mean(1)


class NeverCalled(nn.Module):
    """A layer whose weight is multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.relu(x @ self.layer.weight.T))


class Twice(NeverCalled):
    """A layer that is called, and multiplied by hand."""

    def forward(self, x):
        return self.head(torch.relu(x @ self.layer.weight.T) + self.layer(x))


def trained(kind, mask, table, mode, steps=12):
    torch.manual_seed(0)
    x = torch.randint(0, 32, (8, 5)) if kind is TiedHead else torch.randn(8, 16)
    y = torch.randint(0, 8, (8,))
    half = torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1)
    rule = torchopt.Rule(
        "*",
        prune=torchopt.Prune(schedule=half) if mask else None,
        cluster=torchopt.Cluster(n_clusters=4) if table else None,
        quantize=torchopt.Quantize(mode=mode) if mode else None,
    )
    ready = torchopt.prepare(kind(), [rule], (x,)).train()
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(ready(x), y).backward()
        optimizer.step()
        torchopt.step(ready)
    return ready, x, y


@pytest.mark.parametrize("kind", [TiedHead, NeverCalled, Twice])
@pytest.mark.parametrize(("mask", "table", "mode"), CASES)
def test_prepared_is_finalized(kind, mask, table, mode):
    ready, x, _ = trained(kind, mask, table, mode, steps=3)
    ready.eval()
    with torch.no_grad():
        last, final = ready(x), torchopt.finalize(ready).eval()
        torch.testing.assert_close(final(x), last, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(ready)(x), last, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [TiedHead, NeverCalled, Twice])
def test_a_mask_over_a_table_gives_every_reader_its_gradient(kind):
    ready, x, y = trained(kind, True, True, None, steps=40)
    loss = F.cross_entropy(ready(x), y)
    assert loss < 0.5, "1.20 where the reader outside was given a constant"
    loss.backward()
    for name, parameter in ready.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_gradient_is_the_one_of_plain_weights():
    """A table with one entry a weight, under a mask of ones: the same network as without."""
    torch.manual_seed(0)
    plain = NeverCalled()
    plain.layer.weight.data = plain.layer.weight.data.sign()  # two values, of which all are kept
    rule = torchopt.Rule("layer", prune=torchopt.Prune(schedule=0.0), cluster=torchopt.Cluster(n_clusters=2))
    ready, x = torchopt.prepare(plain, [rule]), torch.randn(8, 16)
    plain(x).sum().backward()
    ready(x).sum().backward()
    torch.testing.assert_close(ready.layer.parametrizations.weight_orig.original.grad, plain.layer.weight.grad)


def test_outside_of_a_pass_the_weight_of_a_quantized_layer_is_the_parameter_that_trains():
    torch.manual_seed(0)
    ready = torchopt.prepare(TiedHead(), [torchopt.Rule("*", quantize=torchopt.Quantize(mode="weight_only"))])
    layers = [m for m in ready.modules() if isinstance(m, Fused)]
    assert len(layers) == 2
    ready(torch.randint(0, 32, (8, 5))).sum().backward()
    for layer in layers:
        assert layer.weight is layer._parameters["weight"]
        assert layer.weight.grad.abs().sum() > 0


class ReadConvolution(nn.Module):
    """A convolution before a batch norm, whose weight is a penalty in the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.norm.weight.data = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))) + F.conv2d(x, self.conv.weight)


def test_a_batch_norm_is_not_folded_into_a_weight_that_another_reads():
    torch.manual_seed(0)
    net, x = ReadConvolution(), torch.randn(8, 2, 6, 6)
    for _ in range(20):
        net(x)
    ready = torchopt.prepare(net, [torchopt.Rule("conv", quantize=torchopt.Quantize())], (x,))
    torchopt.calibrate(ready, [x], progress=False)
    with torch.no_grad():
        wanted, last, final = net.eval()(x), ready.eval()(x), torchopt.finalize(ready).eval()(x)
    torch.testing.assert_close(final, last, rtol=0, atol=1e-5)
    assert (final - wanted).square().mean() < 3e-3 * wanted.square().mean(), "30 dB; 1 dB with the norm folded in"


RULES = {
    "mask": {"prune": torchopt.Prune(schedule=0.5)},
    "table": {"cluster": torchopt.Cluster(n_clusters=4)},
    "static": {"quantize": torchopt.Quantize()},
    "weight_only": {"quantize": torchopt.Quantize(mode="weight_only")},
    "all": {
        "prune": torchopt.Prune(schedule=0.5),
        "cluster": torchopt.Cluster(n_clusters=4),
        "quantize": torchopt.Quantize(),
    },
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", [TiedHead, Twice])
def test_a_pickled_model_in_training_goes_on(name, kind):
    torch.manual_seed(0)
    x = torch.randint(0, 32, (8, 5)) if kind is TiedHead else torch.randn(8, 16)
    ready = torchopt.prepare(kind(), [torchopt.Rule("*", **RULES[name])], (x,)).train()

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            torchopt.step(model)
        return model.eval()(x)

    train(ready)
    file = io.BytesIO()
    torch.save(ready.train(), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert list(again.state_dict()) == list(ready.state_dict())
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in ready.named_parameters()]
    torch.testing.assert_close(train(again), train(ready), rtol=0, atol=0)
    torch.testing.assert_close(torchopt.finalize(copy.deepcopy(again))(x), ready(x), rtol=0, atol=0)
    assert int(again.torchopt_state.step) == 4


def test_recurrent_and_attention_layers_under_tables_can_be_pickled():
    for layer, x in ((nn.GRU(4, 8, batch_first=True), torch.randn(2, 3, 4)), (nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8))):
        rule = torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5), cluster=torchopt.Cluster(n_clusters=4))
        ready = torchopt.prepare(layer, [rule])
        torchopt.step(ready)
        given = (x,) if isinstance(layer, nn.GRU) else (x, x, x)
        file = io.BytesIO()
        torch.save(ready, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        torch.testing.assert_close(again(*given)[0], ready(*given)[0], rtol=0, atol=0)


def test_a_copied_graph_keeps_the_hooks_of_its_root():
    x = torch.randn(4, 16)
    ready = torchopt.prepare(Twice(), [torchopt.Rule("*", quantize=torchopt.Quantize())], (x,))
    seen = []
    ready.register_forward_hook(lambda module, given, output: seen.append(1))
    copy.deepcopy(ready)(x)
    assert seen == [1]
