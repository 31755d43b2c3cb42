"""Channels really removed, to a goal: smaller, exportable, equal in ONNX Runtime, reloadable, and refused with reasons."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchopt
from torchopt.channels import Channels, count_macs
from torchopt.compress.shrink import _bisect, _settled_ratio
from torchopt.runtime import session
from torchopt.runtime.benchmark import Row

FAMILIES = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "convnext_tiny", "vit_b_16", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "mnasnet1_0",
]  # fmt: skip
OTHERS = [
    "googlenet", "inception_v3", "mnasnet0_5", "resnext50_32x4d", "wide_resnet50_2", "swin_t", "maxvit_t", "alexnet", "vgg11_bn",
    "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "efficientnet_v2_s", "r3d_18",
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


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    segmentation = {"weights_backbone": None} if name.startswith(("deeplab", "lraspp")) else {}
    fast = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return alive(torchvision.models.get_model(name, weights=None, **segmentation, **fast))


def check(model: nn.Module, x: torch.Tensor, tmp_path, rebuild, ratio: float = 0.5) -> nn.Module:
    before = copy.deepcopy(model.state_dict())
    shrunk = torchopt.shrink(model, (x,), ratio=ratio)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert count_macs(shrunk, (x[:1],))[0] < 0.5 * count_macs(model, (x[:1],))[0]
    torchopt.export(shrunk, (x,), tmp_path / "s.onnx")
    opened = session(tmp_path / "s.onnx")
    theirs = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]
    ours = next(iter(shrunk(x).values())) if isinstance(shrunk(x), dict) else shrunk(x)
    assert np.abs(ours.detach().numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()
    torchopt.save(shrunk, tmp_path / "s.safetensors")
    again = torchopt.load(tmp_path / "s.safetensors", rebuild()).eval()
    torch.testing.assert_close(again(x), shrunk(x), rtol=0, atol=0)
    return shrunk


def test_small_net(tmp_path):
    shrunk = check(small(), X, tmp_path, small)
    assert shrunk[0].out_channels == 16
    assert shrunk[3].groups == 16
    assert shrunk[8].out_features == 10


def test_torchvision(tmp_path):
    build = partial(torchvision_model, "resnet18")
    check(build(), torch.randn(2, 3, 64, 64), tmp_path, build)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_every_family(name, tmp_path):
    shape = {"inception_v3": (3, 299, 299), "r3d_18": (3, 8, 64, 64)}.get(name, (3, 224, 224))
    build = partial(torchvision_model, name)
    check(build(), torch.randn(2, *shape), tmp_path, build)


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
    channels = Channels(model, (x,))
    found = _bisect(partial(channels.without, round_to=16), latency, goal, [group.layers[0] for group in channels.groups])
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


def test_ignored_layers_keep_their_channels():
    shrunk = torchopt.shrink(small(), (X,), ratio=0.5, ignore=["4"])
    assert shrunk[4].out_channels == 64
    assert shrunk[0].out_channels == 16


def test_shrink_twice_then_train_all_three():
    model = torchopt.shrink(torchopt.shrink(small(), (X,), ratio=0.25), (X,), ratio=0.3)
    assert (model[0].out_channels, model[4].out_channels) == (16, 32)
    rule = torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5), cluster=torchopt.Cluster(n_clusters=8))
    final = torchopt.one_shot(model, [rule])
    assert float((final[4].weight == 0).float().mean()) >= 0.5
    assert len(final[4].weight.unique()) <= 8


def test_modes_and_what_is_frozen_stay():
    model = small().train()
    model[0].weight.requires_grad_(False)
    shrunk = torchopt.shrink(model, (X,), ratio=0.5)
    assert shrunk.training
    assert [p.requires_grad for p in shrunk.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not torchopt.shrink(model.eval(), (X,), ratio=0.5).training


def test_wrapped_models():
    compiled = torch.compile(small(), backend="eager")
    assert torchopt.shrink(compiled, (X,), ratio=0.5)[0].out_channels == 16
    parallel = torchopt.shrink(nn.DataParallel(small()), (X,), ratio=0.5)
    assert parallel.module[0].out_channels == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got no goal; give exactly one"),
        ({"ratio": 0.5, "max_macs": 10}, r"got \['ratio', 'max_macs'\]; give exactly one"),
        ({"ratio": 1.0}, r"ratio=1.0; a fraction of channels in \(0, 1\)"),
        ({"max_macs": 0}, "max_macs=0; a number above 0"),
        ({"ratio": 0.5, "importance": "magnitud"}, "importance='magnitud'; one of .*did you mean 'magnitude'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to=0; a whole number of at least 1"),
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


def test_nothing_to_remove_names_a_layer_and_the_reason():
    with pytest.raises(torchopt.ModelError, match="no channel of Linear can be removed; all of them reach its inputs, outputs"):
        torchopt.shrink(nn.Linear(8, 4), (torch.randn(1, 8),), ratio=0.5)
    narrow = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with pytest.raises(torchopt.ModelError, match=r"ratio=0.5 with round_to=8 removes nothing \(0: 4\); a smaller round_to"):
        torchopt.shrink(narrow, (torch.randn(1, 8),), ratio=0.5)
    assert torchopt.shrink(narrow, (torch.randn(1, 8),), ratio=0.5, round_to=1)[0].out_features == 2


def test_a_prepared_model_and_a_broken_one_are_refused():
    masked = torchopt.prepare(small(), [torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5))])
    with pytest.raises(torchopt.StateError, match="is prepared for training, its weights are masked or shared; finalize it"):
        torchopt.shrink(masked, (X,), ratio=0.5)
    broken = small()
    broken[4].weight.data[0] = float("nan")
    with pytest.raises(torchopt.ModelError, match=r"4\.weight holds NaN or infinity; its channels cannot be ranked"):
        torchopt.shrink(broken, (X,), ratio=0.5)
    with pytest.raises(torchopt.ModelError, match=r"0\.weight has no shape yet; run one batch through the model first"):
        torchopt.shrink(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), (torch.randn(1, 8),), ratio=0.5)


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
