"""Channels really removed: smaller, exportable, equal in ONNX Runtime, reloadable, and refused with reasons."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchopt
from torchopt.prune.shrink_channels import count_macs, remove_channels
from torchopt.prune.shrink_outputs import output_layers
from torchopt.runtime import session
from torchopt.runtime.benchmark import Row
from torchopt.shrink import _bisect, _settled_ratio

FAMILIES = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "convnext_tiny", "vit_b_16", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "mnasnet1_0",
]  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 64, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def alive(model: nn.Module) -> nn.Module:
    """Give zero-initialized heads (ViT's) random weights, so that outputs can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def check(model: nn.Module, x: torch.Tensor, tmp_path, rebuild, ratio: float = 0.5) -> nn.Module:
    before = copy.deepcopy(model.state_dict())
    shrunk = torchopt.shrink(model, (x,), ratio=ratio)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert count_macs(shrunk, (x[:1],))[0] < 0.8 * count_macs(model, (x[:1],))[0]
    torchopt.export(shrunk, (x,), tmp_path / "s.onnx")
    opened = session(tmp_path / "s.onnx")
    theirs = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]
    ours = shrunk(x).detach().numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(ours).max()
    torchopt.save(shrunk, tmp_path / "s.safetensors")
    again = torchopt.load(tmp_path / "s.safetensors", rebuild()).eval()
    torch.testing.assert_close(again(x), shrunk(x), rtol=0, atol=0)
    return shrunk


def test_small_net(tmp_path):
    shrunk = check(small(), X, tmp_path, small)
    assert shrunk[0].out_channels == 16
    assert shrunk[3].groups == 16
    assert shrunk[8].out_features == 10


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x1_0"])
def test_torchvision(name, tmp_path):
    build = lambda: torchvision.models.get_model(name, weights=None)
    check(alive(build()), torch.randn(2, 3, 64, 64), tmp_path, build)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    build = lambda: torchvision.models.get_model(name, weights=None)
    check(alive(build()), torch.randn(2, 3, 224, 224), tmp_path, build)


@pytest.mark.parametrize("importance", ["magnitude", "lamp", "fpgm", "bn_scale", "taylor", "random"])
def test_importances(importance):
    model = small()
    if importance == "taylor":
        model(X).square().sum().backward()
    assert torchopt.shrink(model, (X,), ratio=0.5, importance=importance)[0].out_channels == 16


def test_taylor_keeps_the_channels_that_matter():
    model = nn.Sequential(nn.Conv2d(1, 16, 1, bias=False), nn.Conv2d(16, 2, 1, bias=False)).eval()
    with torch.no_grad():
        model[1].weight[:, :8] = 0  # the first eight channels reach no output
    x = torch.randn(4, 1, 3, 3)
    model(x).square().sum().backward()
    shrunk = torchopt.shrink(model, (x,), ratio=0.5, importance="taylor")
    torch.testing.assert_close(shrunk(x), model(x))


@pytest.mark.parametrize(
    "options", [{"global_ranking": True}, {"isomorphic": True}, {"global_ranking": True, "isomorphic": True}]
)
def test_global_and_isomorphic_ranking(options):
    shrunk = torchopt.shrink(small(), (X,), ratio=0.4, **options)
    assert count_macs(shrunk, (X,))[0] < count_macs(small(), (X,))[0]
    assert shrunk(X).shape == (2, 10)


def test_max_macs_is_met_closely():
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    goal = count_macs(model, (x,))[0] // 2
    macs = count_macs(torchopt.shrink(model, (x,), max_macs=goal, round_to=4), (x,))[0]
    assert 0.9 * goal <= macs <= goal


def test_the_slowest_candidate_below_a_latency_goal_is_found():
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    latency = lambda candidate: count_macs(candidate, (x,))[0] / 1e6
    goal = 0.5 * latency(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    cut = partial(remove_channels, model, (x,), round_to=16)
    found = _bisect(cut, latency, goal, names)
    assert 0.95 * goal <= latency(found) <= goal
    assert found.layer2[0].conv1.out_channels % 16 == 0


def test_a_latency_near_the_goal_is_measured_until_it_is_clear():
    asked = []

    def measure(ratio: float, spread: float, repeats: int) -> Row:
        asked.append(repeats)
        quartiles = {"ratio": ratio, "ratio_low": ratio - spread / 2, "ratio_high": ratio + spread / 2}
        return Row(path="", latency_ms=1, low_ms=1, high_ms=1, load_ms=1, size_bytes=1, peak_bytes=None, **quartiles)

    assert _settled_ratio(partial(measure, 0.8, 0.1), 0.5) == 0.8
    assert asked == [15]
    assert _settled_ratio(partial(measure, 0.52, 0.06), 0.5) == 0.52  # 2 · 0.93 · 0.06 / √n < 0.02 for n > 31
    assert asked[1:] == [15, 30, 60]
    assert _settled_ratio(partial(measure, 0.5, 0.1), 0.5) == 0.5
    assert asked[4:] == [15, 30, 60, 120]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_half_the_latency_in_onnx_runtime(name, tmp_path):
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    torchopt.export(model, (x,), tmp_path / "dense.onnx", pack=False)
    dense = torchopt.benchmark([tmp_path / "dense.onnx"], progress=False).rows[0].latency_ms
    torchopt.export(torchopt.shrink(model, (x,), max_latency_ms=dense / 2), (x,), tmp_path / "half.onnx", pack=False)
    rows = torchopt.benchmark([tmp_path / "dense.onnx", tmp_path / "half.onnx"], progress=False).rows
    assert 0.4 < rows[1].ratio < 0.6


class TwoHeads(nn.Module):
    """Two outputs; the first one's layer does not run last, and a norm stands on it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.boxes = nn.Conv2d(32, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.scores = nn.Conv2d(32, 24, 1)

    def forward(self, x):
        features = torch.relu(self.stem(x))
        return {"boxes": self.norm(self.boxes(features)), "scores": [self.scores(features).sigmoid()]}


def test_every_output_keeps_its_channels():
    model = TwoHeads().eval()
    assert set(output_layers(model, (X,))) == {model.boxes, model.scores}
    shrunk = torchopt.shrink(model, (X,), ratio=0.5)
    made = shrunk(X)
    assert made["boxes"].shape == (2, 16, 16, 16)
    assert made["scores"][0].shape == (2, 24, 16, 16)
    assert shrunk.stem.out_channels == 16


def test_an_addition_before_the_output_keeps_both_of_its_layers():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x):
            hidden = self.stem(x).relu()
            return self.a(hidden) + self.b(hidden)

    model = Sum().eval()
    shrunk = torchopt.shrink(model, (torch.zeros(1, 8),), ratio=0.5)
    assert set(output_layers(model, (torch.zeros(1, 8),))) == {model.a, model.b}
    assert (shrunk.stem.out_features, shrunk.a.out_features, shrunk.b.out_features) == (16, 16, 16)


def test_attention_heads_stay_and_the_report_names_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head((x + self.narrow(self.wide(x).relu())).mean(1))

    x = torch.randn(2, 6, 32)
    shrunk = torchopt.shrink(Block().eval(), (x,), ratio=0.5)
    assert (shrunk.attention.embed_dim, shrunk.wide.out_features) == (32, 32)
    skipped = torchopt.report(shrunk).skipped
    assert [(s.name, s.technique) for s in skipped] == [("attention", "shrink")]
    assert skipped[0].reason == "all 4 attention heads stay: they index into its width"
    assert "left alone by shrink: attention: all 4 attention heads stay" in str(torchopt.report(shrunk))


def test_pieces_honour_ratios_of_their_own_and_the_report_names_the_rest():
    model = torchvision.models.shufflenet_v2_x1_0(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    ratios = {"stage2.1.branch2.3": 0.0, "stage2.2.branch2.3": 0.75}  # depthwise layers lead their groups
    shrunk = remove_channels(model, (x,), 0.5, round_to=2, ratios=ratios)
    widths = [shrunk.stage2[i].branch2[0].out_channels for i in (1, 2, 3)]
    assert widths == [58, 14, 28]
    kept = {s.name: s.reason for s in torchopt.report(shrunk).skipped}
    assert {"conv1.0", "conv5.0", "fc"} <= set(kept)
    assert not any("branch2" in name for name in kept)
    assert kept["conv5.0"].startswith("keeps its channels: torch-pruning cannot follow the network as a whole (")


def test_ignored_layers_keep_their_channels():
    shrunk = torchopt.shrink(small(), (X,), ratio=0.5, ignore=["4"])
    assert shrunk[4].out_channels == 64
    assert shrunk[0].out_channels == 16


def test_shrink_twice_then_train_all_three():
    model = torchopt.shrink(torchopt.shrink(small(), (X,), ratio=0.25), (X,), ratio=0.3)
    rule = torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5), cluster=torchopt.Cluster(n_clusters=8))
    final = torchopt.one_shot(model, [rule])
    assert float((final[4].weight == 0).float().mean()) >= 0.5
    assert len(final[4].weight.unique()) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got no goal; give exactly one"),
        ({"ratio": 0.5, "max_macs": 10}, r"got \['ratio', 'max_macs'\]; give exactly one"),
        ({"ratio": 1.0}, r"ratio=1.0; a fraction of channels in \(0, 1\)"),
        ({"max_macs": 0}, "max_macs=0; a number above 0"),
        ({"ratio": 0.5, "importance": "magnitud"}, "importance='magnitud'; one of .*did you mean 'magnitude'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(torchopt.ConfigError, match=message):
        torchopt.shrink(small(), (X,), **options)


def test_ignore_that_matches_nothing():
    with pytest.raises(torchopt.RuleError, match="ignore='stem' matches no module"):
        torchopt.shrink(small(), (X,), ratio=0.5, ignore=["stem"])


def test_inputs_of_another_shape():
    with pytest.raises(torchopt.DataError, match="does not take the example inputs"):
        torchopt.shrink(small(), (torch.randn(1, 4, 8, 8),), ratio=0.5)


def test_unreachable_macs_names_the_best():
    with pytest.raises(torchopt.TargetError, match=r"max_macs=5 cannot be reached; the fewest found is [\d,]+"):
        torchopt.shrink(small(), (X,), max_macs=5)


def test_unreachable_latency_names_the_best():
    with pytest.raises(torchopt.TargetError, match=r"max_latency_ms=1e-06 cannot be reached; the fastest found takes [\d.]+ ms"):
        torchopt.shrink(small(), (X,), max_latency_ms=1e-6)


def test_a_plan_of_another_architecture_is_refused(tmp_path):
    torchopt.save(torchopt.shrink(small(), (X,), ratio=0.5), tmp_path / "s.safetensors")
    with pytest.raises(torchopt.StateError, match="was saved from another architecture than Linear"):
        torchopt.load(tmp_path / "s.safetensors", nn.Linear(3, 2))
