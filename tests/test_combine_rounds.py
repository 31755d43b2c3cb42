"""Rounds of prepare → train → finalize that keep what they find: TFMOT's collaborative modes (X1–X10) and its sizes (Z2, Z3)."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule
from torchopt.cluster import shared_weights
from torchopt.data import Digits
from torchopt.runtime import session

HALF = Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1))
INT8 = Quantize()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def train(ready: nn.Module, steps: int = 6, lr: float = 0.05) -> nn.Module:
    x, y = data()
    optimizer = torch.optim.SGD(ready.train().parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ready(x), y).backward()
        optimizer.step()
        torchopt.step(ready)
    return ready


def round_of(model: nn.Module, *rules: Rule, steps: int = 6, preserve: bool = True) -> nn.Module:
    return torchopt.finalize(train(torchopt.prepare(model, rules, (data()[0][:2],), preserve=preserve), steps))


def kernels(model: nn.Module) -> list[torch.Tensor]:
    return [w.value.detach() for w in torchopt.network.weights.weights(model)]


def distinct(model: nn.Module) -> list[int]:
    return [w.unique().numel() for w in kernels(model)]


def zeros(model: nn.Module) -> list[int]:
    return [int((w == 0).sum()) for w in kernels(model)]


SIX = Cluster(n_clusters=6)
FOUR = Rule("*", cluster=Cluster(n_clusters=4))


@pytest.mark.parametrize(
    "rules",
    [(FOUR,), (Rule("2", cluster=Cluster(n_clusters=4)),), (Rule("0", cluster=Cluster(n_clusters=4)), Rule("5", cluster=SIX))],
    ids=["whole model", "one layer", "by layer"],
)  # fmt: skip
def test_X1_quantization_aware_training_keeps_the_shared_values(rules):
    clustered = round_of(network(), *rules)
    final = round_of(clustered, Rule("*", quantize=INT8))
    before, after = distinct(clustered), distinct(final)
    assert any(count <= 6 for count in before)
    assert all(b == a for b, a in zip(before, after) if b <= 6)
    assert len(torchopt.network.grid.grids(final)) == 3


def test_X2_three_rounds_keep_zeros_and_values():
    sparse = round_of(network(), Rule("*", prune=HALF))
    clustered = round_of(sparse, Rule("*", cluster=Cluster(n_clusters=8)))
    final = round_of(clustered, Rule("*", quantize=INT8))
    assert zeros(sparse) == [54, 648, 960]
    assert all(now >= then for then, now in zip(zeros(sparse), zeros(clustered)))
    assert all(now >= then for then, now in zip(zeros(clustered), zeros(final)))
    assert distinct(clustered) == distinct(final) == [8, 8, 8]


def test_X3_without_preserve_the_zeros_go_and_new_clusters_are_kept():
    sparse = round_of(network(), Rule("*", prune=HALF))
    loose = round_of(sparse, Rule("*", cluster=Cluster(n_clusters=8), quantize=INT8), preserve=False, steps=12)
    counts = [w.numel() for w in kernels(loose)]
    assert all(count <= 8 for count in distinct(loose))
    assert sum(zeros(loose)) < 0.5 * sum(counts) <= sum(zeros(round_of(sparse, Rule("*", quantize=INT8))))


def test_X4_four_values_in_each_channel():
    clustered = round_of(network(), Rule("2", cluster=Cluster(n_clusters=4, per_channel=True)), steps=9)
    assert [channel.unique().numel() for channel in clustered[2].weight] == [4] * 12
    joint = round_of(network(), Rule("2", cluster=Cluster(n_clusters=4, per_channel=True), quantize=INT8), steps=9)
    weight = dict(zip([w.name for w in torchopt.network.weights.weights(joint)], kernels(joint)))["2.weight"]
    assert [channel.unique().numel() for channel in weight] == [4] * 12


def test_X5_without_zeros_the_rounds_are_those_without_pruning():
    clustered = round_of(network(), FOUR)
    assert zeros(clustered) == [0, 0, 0]
    one = round_of(clustered, Rule("*", quantize=INT8))
    other = round_of(clustered, Rule("*", quantize=INT8, prune=Prune(schedule=ConstantSparsity(target_sparsity=0.0))))
    assert distinct(one) == [4, 4, 4]
    assert all(w[w != 0].unique().numel() <= 4 for w in kernels(other))  # a mask brings 0 with it


def test_X7_a_small_convolution_is_left_alone_and_says_so():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 10))
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=16))])
    skipped = torchopt.report(ready).to_dict()["skipped"]
    assert [(s["name"], s["reason"]) for s in skipped] == [("0.weight", "12 distinct values, no more than n_clusters=16")]
    final = torchopt.finalize(train(ready))
    assert final[0].weight.unique().numel() == 12
    assert final[3].weight.unique().numel() == 16


def test_X8_values_move_and_zero_stays():
    sparse = round_of(network(), Rule("*", prune=HALF))
    ready = torchopt.prepare(sparse, [Rule("*", cluster=Cluster(n_clusters=8), quantize=INT8)], (data()[0][:2],))
    before = [shared.values().detach().clone() for _, shared in shared_weights(ready)]
    train(ready)
    for old, (_, shared) in zip(before, shared_weights(ready), strict=True):
        assert float(old[0, 0]) == float(shared.values().detach()[0, 0]) == 0.0
        assert (old[0, 1:] != shared.values().detach()[0, 1:]).any()


def test_X10_a_layer_that_only_some_techniques_know_gets_those():
    """TFMOT raises; here a norm has no weight to compress, and the others are compressed."""
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    ready = torchopt.prepare(net, [Rule("*", prune=HALF, cluster=Cluster(n_clusters=4), quantize=INT8)], (torch.randn(2, 16),))
    assert [row.name for row in torchopt.report(ready).rows] == ["0.weight", "2.weight"]
    with pytest.raises(torchopt.RuleError, match="matches no module that owns a weight"):
        torchopt.prepare(net, [Rule("1", quantize=INT8)])


# ---- real data


@pytest.fixture(scope="module")
def digits():
    found = Digits().load()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip
    fit(net, found, 4, 0.003)
    return found, net


def fit(model: nn.Module, found, epochs: int, lr: float, step=None) -> nn.Module:
    x, y = found.train_inputs, found.train_labels
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    torch.manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if step is not None:
                step(model)
    return model.eval()


def accuracy(answers: np.ndarray, found) -> float:
    return float((answers.argmax(1) == found.test_labels.numpy()[: len(answers)]).mean())


def test_X9_Z2_Z3_digits_stay_right_and_become_small(digits, tmp_path):
    """Half of the weights, then 8 values, then integers: > 0.8 in TFMOT; here within 2 points, in less than a fifth of the bytes."""
    found, net = digits
    example = (found.test_inputs[:1],)
    model, base = copy.deepcopy(net), accuracy(net(found.test_inputs).detach().numpy(), found)
    assert base > 0.92
    sparse = fit(torchopt.prepare(model, [Rule("*", prune=HALF)]), found, 1, 0.001, torchopt.step)
    clustered = fit(
        torchopt.prepare(torchopt.finalize(sparse), [Rule("*", cluster=Cluster(n_clusters=8))]), found, 1, 0.001, torchopt.step
    )
    shared = torchopt.finalize(clustered).eval()
    after_training = torchopt.one_shot(
        shared, [Rule("*", quantize=INT8)], [found.train_inputs[:128]], example_inputs=example, progress=False
    )
    trained = fit(torchopt.prepare(shared, [Rule("*", quantize=INT8)], example), found, 1, 0.001, torchopt.step)
    final = torchopt.finalize(trained).eval()
    torchopt.export(net, example, tmp_path / "float.onnx", pack=False)
    torchopt.export(final, example, tmp_path / "small.onnx")
    opened = session(tmp_path / "small.onnx")
    images = found.test_inputs[:300].numpy()
    deployed = accuracy(opened.run(None, {opened.get_inputs()[0].name: images})[0], found)
    scores = [accuracy(m.eval()(found.test_inputs).detach().numpy(), found) for m in (final, after_training)]
    assert deployed > 0.92
    assert scores[0] >= base - 0.02
    assert scores[0] >= scores[1] - 0.005
    assert distinct(final) == distinct(shared)
    assert max(distinct(final)) <= 8
    assert (tmp_path / "small.onnx").stat().st_size < 0.2 * (tmp_path / "float.onnx").stat().st_size
