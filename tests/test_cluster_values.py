"""Tables on every kind of layer: how many values, which layers, what is left alone, what comes off (C1-C3, C10, C13-C20, C23)."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt.cluster import Cluster, attach, bake, kmeans, shared_weights, squared_error, table_of, update
from torchopt.errors import ConfigError, ModelError, RuleError, StateError
from torchopt.network.grid import grids
from torchopt.network.weights import Weight, find_weight, weights
from torchopt.rules import Rule


def distinct(tensor: torch.Tensor) -> int:
    return tensor.detach().unique().numel()


def clustered(net: nn.Module, *, steps: int = 0, x: torch.Tensor | None = None, **config) -> nn.Module:
    """Prepare, train for some steps with SGD, finalize."""
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(**config))])
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        out = ready(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
        torchopt.step(ready)
    return torchopt.finalize(ready)


def test_C1_default_start_is_never_above_plus_plus():
    """Corrected: the default is the global optimum, so that k-means++ (TFMOT's default, still there) can at best equal it."""
    assert Cluster(n_clusters=8).init == "optimal"
    values = np.random.default_rng(0).standard_normal(1000)
    errors = [squared_error(values, kmeans(values, 16, init="kmeans++", seed=s)) for s in range(10)]
    assert squared_error(values, kmeans(values, 16)) <= min(errors) * (1 + 1e-12)


@pytest.mark.parametrize("init", ["optimal", "kmeans++", "linear", "density", "random"])
@pytest.mark.parametrize("n_clusters", [2, 6, 10, 14])
def test_C2_at_most_n_values_without_training(init, n_clusters):
    torch.manual_seed(0)
    final = clustered(nn.Linear(10, 32), n_clusters=n_clusters, init=init)
    assert distinct(final.weight) == n_clusters


def test_C3_at_most_8_values_after_training():
    torch.manual_seed(0)
    final = clustered(nn.Linear(10, 32), steps=20, x=torch.randn(16, 10), n_clusters=8)
    assert distinct(final.weight) == 8


@pytest.mark.parametrize("bias", [True, False])
def test_C10_per_channel(bias):
    """Corrected: TFMOT skips convolutions without bias."""
    torch.manual_seed(0)
    final = clustered(nn.Conv2d(1, 12, 3, bias=bias), steps=2, x=torch.randn(4, 1, 8, 8), n_clusters=4, per_channel=True)
    assert [distinct(channel) for channel in final.weight] == [4] * 12
    assert distinct(final.weight) == 48


def test_groups_of_channels_and_transposed_convolution():
    torch.manual_seed(0)
    final = clustered(nn.Conv2d(3, 12, 3), n_clusters=4, per_channel=True, channels_per_table=3)
    assert [distinct(final.weight[i : i + 3]) for i in range(0, 12, 3)] == [4] * 4
    final = clustered(nn.ConvTranspose2d(6, 5, 3), steps=2, x=torch.randn(2, 6, 4, 4), n_clusters=4, per_channel=True)
    assert [distinct(final.weight[:, i]) for i in range(5)] == [4] * 5


def test_C13_zeros_are_preserved():
    torch.manual_seed(0)
    net = nn.Linear(5, 10)
    net.weight.data[:4] = 0.0
    final = clustered(net, steps=100, x=torch.randn(16, 5), n_clusters=6)
    assert (final.weight[:4] == 0).all()
    assert distinct(final.weight) <= 6
    assert (final.weight == 0).sum() >= 20


@pytest.mark.parametrize(
    ("config", "left"), [({"n_clusters": 16}, True), ({"n_clusters": 12}, True), ({"n_clusters": 11}, False)]
)
def test_C14_too_few_weights_are_left_alone(config, left):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 1), nn.Flatten(), nn.Linear(12 * 16, 4))
    before = net[0].weight.detach().clone()
    found = weights(net)
    skipped = attach([(w, Cluster(**config)) for w in found], preserve=True)
    assert [s.name for s in skipped] == (["0.weight"] if left else [])
    if left:
        assert skipped[0].technique == "cluster"
        assert skipped[0].reason == f"12 distinct values, no more than n_clusters={config['n_clusters']}"
        torch.testing.assert_close(net[0].weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("n_clusters", [8, 12])
def test_C14_per_channel_too_few_weights_are_left_alone(n_clusters):
    net = nn.Sequential(nn.Conv2d(1, 12, 1), nn.Conv2d(12, 4, 3))
    skipped = attach([(w, Cluster(n_clusters=n_clusters, per_channel=True)) for w in weights(net)], preserve=True)
    assert [s.name for s in skipped] == ["0.weight"]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("variant", ["plain", "bidirectional", "stacked", "masked"])
def test_C15_recurrent(kind, variant):
    torch.manual_seed(0)
    net = kind(16, 16, batch_first=True, bidirectional=variant == "bidirectional", num_layers=1 + (variant == "stacked"))
    x = torch.randn(4, 6, 16)
    dense = net(x)[0]
    ready = torchopt.prepare(
        net, [Rule("*", prune=torchopt.Prune(schedule=0.5) if variant == "masked" else None, cluster=Cluster(n_clusters=16))]
    )
    assert not torch.allclose(ready(x)[0], dense)  # the shared weights are those that forward uses
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ready(x)[0].square().mean().backward()
        assert all(p.grad is not None for p in ready.parameters())
        optimizer.step()
        torchopt.step(ready)
    with torch.no_grad():
        last = ready(x)[0]
        final = torchopt.finalize(ready)
        torch.testing.assert_close(final(x)[0], last, rtol=0, atol=0)
        torch.testing.assert_close(ready(x)[0], last, rtol=0, atol=0)
    assert type(final) is kind
    assert [distinct(w.value) for w in weights(final)] == [16] * len(weights(net))
    assert [n for n, _ in final.named_parameters()] == [n for n, _ in net.named_parameters()]
    final.weight_hh_l0.data.zero_()  # the list that forward reads is of the Parameters again
    assert not torch.allclose(final(x)[0], last)


def test_C15_embedding_and_attention():
    torch.manual_seed(0)
    final = clustered(nn.Embedding(50, 16), steps=3, x=torch.arange(50), n_clusters=16)
    assert distinct(final.weight) == 16
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=16))]).eval()
    with torch.no_grad():
        last = ready(x)
        final = torchopt.finalize(ready)
        torch.testing.assert_close(final(x), last, rtol=1e-5, atol=1e-6)
    assert {w.name: distinct(w.value) for w in weights(final)} == {
        name: 16 for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    }
    separate = clustered(nn.MultiheadAttention(16, 4, kdim=12, vdim=20), n_clusters=16)
    assert [distinct(w.value) for w in weights(separate)] == [16] * 4


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(8, 16, 3), nn.Conv3d(4, 8, 3), nn.ConvTranspose1d(8, 16, 3), nn.ConvTranspose3d(4, 8, 3)]
)
def test_convolutions_of_every_rank(layer):
    assert distinct(clustered(layer, n_clusters=8).weight) == 8


def test_C16_depthwise_norms_and_biases_are_untouched():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=4))])
    final = torchopt.finalize(ready)
    for name in ("0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"):
        torch.testing.assert_close(final.state_dict()[name], net.state_dict()[name], rtol=0, atol=0)
    assert (distinct(final[0].weight), distinct(final[3].weight)) == (4, 4)
    skipped = attach([(w, Cluster(n_clusters=4)) for w in weights(net)], preserve=True)
    assert [(s.name, s.reason) for s in skipped] == [("2.weight", "depthwise (include_depthwise=False)")]
    assert distinct(clustered(nn.Conv2d(8, 8, 3, groups=8), n_clusters=4, include_depthwise=True).weight) == 4


def test_skip_first():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    config = Cluster(n_clusters=4, skip_first=True)
    skipped = attach([(w, config) for w in weights(net)], preserve=True)
    assert [(s.name, s.reason) for s in skipped] == [("0.weight", "first of the matched layers (skip_first=True)")]
    assert [distinct(w.value) for w in weights(net)] == [288, 4, 4]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(10, 10))

    def forward(self, x):
        return x @ self.kernel


def test_C18_custom_layers():
    """Corrected: no interface is needed; a custom layer's parameter is named in the rule, and without that the rule says so."""
    torch.manual_seed(0)
    net = nn.Sequential(Custom(), nn.Linear(10, 2))
    with pytest.raises(RuleError):
        torchopt.prepare(net, [Rule("0", cluster=Cluster(n_clusters=4))])
    final = torchopt.finalize(torchopt.prepare(net, [Rule("0", params=["kernel"], cluster=Cluster(n_clusters=4))]))
    assert distinct(final[0].kernel) == 4
    assert type(final[0]) is Custom


def test_C19_taking_off_restores_everything():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4, bias=False))
    types, names = [type(m) for m in net.modules()], list(net.state_dict())
    before = copy.deepcopy(net.state_dict())
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=4))])
    final = torchopt.finalize(ready)
    assert [type(m) for m in final.modules()] == types
    assert list(final.state_dict()) == names
    assert [n for n, _ in final.named_parameters()] == names
    assert not any("parametrizations" in m._modules for m in final.modules())
    final[0].weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    final[3].weight.data.fill_(1.0)
    assert (final(torch.ones(1, 3, 6, 6)) != 0).all()
    assert distinct(ready[3].weight) == 4  # the trainable model is still whole
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_C19_a_parametrization_of_the_users_stays():
    layer = nn.utils.parametrizations.orthogonal(nn.Bilinear(4, 4, 4), "weight") if False else nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus(), unsafe=True)
    net = nn.Sequential(layer)
    bias = layer.bias.detach().clone()
    attach([(weights(net)[0], Cluster(n_clusters=4))], preserve=True)
    other = copy.deepcopy(net)
    bake(net)
    assert type(net[0].weight) is nn.Parameter
    assert distinct(net[0].weight) == 4
    torch.testing.assert_close(net[0].bias.detach(), bias, rtol=0, atol=0)
    assert distinct(other[0].weight) == 4
    assert len(list(shared_weights(other))) == 1


def test_C20_nested_two_deep():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    net = nn.Sequential(nn.Sequential(nn.Sequential(inner, nn.Linear(16, 8)), nn.ReLU()), nn.Linear(8, 8))
    final = clustered(net, steps=2, x=torch.randn(4, 16), n_clusters=5)
    assert [distinct(w.value) for w in weights(final)] == [5, 5, 5]


@pytest.mark.parametrize("per_channel", [False, True])
def test_C23_onnx_runtime_sees_at_most_n_values(tmp_path, per_channel):
    import onnx
    from onnx import numpy_helper

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(1, 3, 8, 8)
    final = clustered(net, n_clusters=8, per_channel=per_channel).eval()
    result = torchopt.export(final, (x,), tmp_path / "model.onnx", pack=False)
    assert result is not None
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    rows = found["0.weight"].reshape(8, -1)
    counts = [len(np.unique(row)) for row in rows]
    assert max(counts) <= 8
    assert per_channel or len(np.unique(rows)) == 8
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ours = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(ours, final(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# ---- successive rounds


def test_an_earlier_rounds_values_are_kept():
    torch.manual_seed(0)
    first = clustered(nn.Linear(16, 32), n_clusters=6)
    ready = torchopt.prepare(first, [Rule("*", cluster=Cluster(n_clusters=16))])
    torch.testing.assert_close(ready.weight.detach(), first.weight.detach(), rtol=0, atol=0)
    again = clustered(first, steps=10, x=torch.randn(8, 16), n_clusters=16)
    assert distinct(again.weight) == 6


def test_without_preserve_few_values_are_left_alone():
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    net[0].weight.data = torch.tensor([0.5, -0.25]).repeat(256).reshape(32, 16)
    skipped = attach([(w, Cluster(n_clusters=4)) for w in weights(net)], preserve=False)
    assert [(s.name, s.reason) for s in skipped] == [("0.weight", "2 distinct values, no more than n_clusters=4")]


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_X6_uniform_weights_do_not_crash(value):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].weight.data.fill_(value)
    final = clustered(net, n_clusters=4)
    assert (final[0].weight == value).all()
    assert distinct(final[1].weight) == 4


def test_zero_is_pinned_under_a_mask_that_has_no_zeros_yet():
    torch.manual_seed(0)
    schedule = torchopt.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.5, begin_step=0, end_step=4, frequency=1)
    ready = torchopt.prepare(
        nn.Linear(16, 16), [Rule("*", prune=torchopt.Prune(schedule=schedule), cluster=Cluster(n_clusters=8))]
    )
    optimizer = torch.optim.Adam(ready.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        ready(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        torchopt.step(ready)
        table = table_of(find_weight(ready, "weight"))
        assert table[0, 0] == 0
        assert table.shape == (1, 8)
    final = torchopt.finalize(ready)
    assert (final.weight == 0).sum() >= 128
    assert distinct(final.weight) == 8


# ---- the integer grid of the table


@pytest.mark.parametrize("per_channel", [False, True])
def test_table_bits_puts_the_weights_on_a_grid(per_channel):
    torch.manual_seed(0)
    final = clustered(nn.Conv2d(3, 4, 5), steps=3, x=torch.randn(2, 3, 8, 8), n_clusters=7, table_bits=4, per_channel=per_channel)
    grid = grids(final)["weight"]
    codes = grid.codes(final.weight.detach())
    assert (grid.bits, grid.axis) == (4, 0 if per_channel else None)
    assert codes.abs().max() == 7
    assert max(distinct(channel) for channel in codes) <= 7


# ---- importance


def test_importance_moves_the_table():
    torch.manual_seed(0)
    net = nn.Linear(32, 32)
    importance = torch.where(net.weight > 0, 1.0, 1e-6)
    even, weighted = copy.deepcopy(net), copy.deepcopy(net)
    attach([(weights(even)[0], Cluster(n_clusters=8))], preserve=True)
    attach([(weights(weighted)[0], Cluster(n_clusters=8))], preserve=True, importance={"weight": importance})
    positive = net.weight > 0
    error = lambda net_: (net_.weight - net.weight)[positive].square().sum()
    assert error(weighted) < 0.6 * error(even)
    assert (table_of(weights(weighted)[0]) > 0).sum() > (table_of(weights(even)[0]) > 0).sum()


# ---- refusals


@pytest.mark.parametrize("value", ["13", 13.4, 0, 1, -32, 257, True, None])
def test_C17_numbers_of_clusters(value):
    with pytest.raises(ConfigError, match=r"Cluster\.n_clusters: got .*; a whole number from 2 to 256 is needed"):
        Cluster(n_clusters=value)


def test_C17_two_clusters_with_zero_kept():
    net = nn.Linear(8, 8)
    net.weight.data[0] = 0.0
    with pytest.raises(
        RuleError, match=r"n_clusters=2 with zero kept leaves one other value for both signs; use n_clusters=3 or more"
    ):
        attach([(weights(net)[0], Cluster(n_clusters=2))], preserve=True)


BAD = (
    ({"init": "kmean"}, r"Cluster\.init: got 'kmean'; one of 'optimal', 'kmeans\+\+'.*is needed; did you mean 'kmeans\+\+'"),
    ({"gradient": "max"}, r"Cluster\.gradient: got 'max'; one of 'mean', 'sum' is needed"),
    ({"iterations": -1}, r"Cluster\.iterations: got -1; a whole number of at least 0"),
    ({"frequency": 0}, r"Cluster\.frequency: got 0; a whole number of at least 1"),
    ({"seed": 1.5}, r"Cluster\.seed: got 1\.5;"),
    ({"per_channel": 1}, r"Cluster\.per_channel: got 1; true or false is needed"),
    ({"temperature": 0}, r"Cluster\.temperature: got 0; a number in \(0, 10\] is needed"),
    ({"channels_per_table": 2}, r"Cluster\.channels_per_table: got 2 with per_channel=False; set per_channel=True"),
    ({"table_bits": 9}, r"Cluster\.table_bits: got 9; a whole number from 2 to 8"),
    (
        {"table_bits": 3},
        r"Cluster\.table_bits: 3 bits hold 7 symmetric integers, fewer than n_clusters=8; use more bits or at most 7",
    ),
)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        Cluster(**{"n_clusters": 8, **change})


def test_refused_weights():
    bad = nn.Linear(8, 8)
    bad.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weight: holds NaN or infinity"):
        attach([(weights(bad)[0], Cluster(n_clusters=4))], preserve=True)
    small = nn.Linear(3, 3)
    with pytest.raises(RuleError, match=r"weight: cluster has nothing to act on: 9 distinct values, no more than n_clusters=16"):
        attach([(weights(small)[0], Cluster(n_clusters=16))], preserve=True)
    twice = nn.Linear(8, 8)
    attach([(weights(twice)[0], Cluster(n_clusters=4))], preserve=True)
    with pytest.raises(ModelError, match=r"weight: parametrized already; remove that parametrization"):
        attach([(weights(twice)[0], Cluster(n_clusters=4))], preserve=True)
    with pytest.raises(RuleError, match=r"channels_per_table=3 does not divide 8 output channels"):
        attach([(weights(nn.Linear(8, 8))[0], Cluster(n_clusters=4, per_channel=True, channels_per_table=3))], preserve=True)
    with pytest.raises(StateError):
        torchopt.step(nn.Linear(8, 8))


def test_frozen_weights_are_reported():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].weight.requires_grad_(False)
    skipped = attach([(w, Cluster(n_clusters=4)) for w in weights(net)], preserve=True)
    assert [(s.name, s.reason) for s in skipped] == [("0.weight", "frozen (requires_grad=False)")]


def test_tied_weights_have_one_table():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    attach([(w, Cluster(n_clusters=4, gradient="sum")) for w in weights(net)], preserve=True)
    first, second, third = (net[i].parametrizations.weight for i in range(3))
    assert first[0] is third[0]
    assert first.original is third.original
    assert first[0] is not second[0]
    assert len(list(net.parameters())) == 2 + 3 + 2  # originals, biases, tables
    (net[0].weight.sum() + net[2].weight.sum()).backward()
    torch.testing.assert_close(first[0].table.grad[0], 2.0 * first[0].member_counts()[0], rtol=0, atol=0)
    twin = copy.deepcopy(net)
    assert twin[0].parametrizations.weight[0] is twin[2].parametrizations.weight[0]
    bake(net)
    assert net[0].weight is net[2].weight
    assert [list(m._parameters) for m in net] == [["weight", "bias"]] * 3
    assert distinct(net[0].weight) == 4


def test_a_weight_without_table_has_none():
    layer = nn.Linear(8, 8)
    assert table_of(Weight(module_name="", module=layer, param="weight", kind="linear")) is None
    assert update(layer, 1) is False
