"""How channels are ranked and counted, and the proof that a cut is right."""

from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchopt
from torchopt.channels import Channels, count_macs, skipped_of
from torchopt.channels.cut import cut
from torchopt.channels.follow.identity import Identities
from torchopt.channels.groups import Group
from torchopt.channels.proved.check import Proof
from torchopt.channels.rank import choose

IMAGE = torch.randn(2, 3, 16, 16)
C, L, S = nn.Conv2d, nn.Linear, nn.Sequential


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return S(
        C(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), C(32, 32, 3, groups=32), C(32, 64, 1), nn.ReLU(), C(64, 10, 1)
    ).eval()


@pytest.mark.parametrize("importance", ["magnitude", "lamp", "fpgm", "taylor", "random"])
def test_importances(importance):
    model = conv_net()
    if importance == "taylor":
        model(IMAGE).square().sum().backward()
    assert torchopt.shrink(model, (IMAGE,), ratio=0.5, importance=importance)[0].out_channels == 16


def ramp() -> nn.Module:
    """Channel i of the hidden layer has rows and columns of length i + 1, and a scale of 8 - i."""
    model = S(L(1, 8, bias=False), nn.BatchNorm1d(8), L(8, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 9)[:, None])
        model[1].weight.copy_(torch.arange(8.0, 0, -1))
        model[2].weight.copy_(torch.arange(1.0, 9)[None])
    return model


@pytest.mark.parametrize(
    ("importance", "left"),
    [("magnitude", [5.0, 6, 7, 8]), ("lamp", [5.0, 6, 7, 8]), ("bn_scale", [1.0, 2, 3, 4]), ("fpgm", [1.0, 2, 7, 8])],
)
def test_which_channels_stay(importance, left):
    """By size, by the scale of their norm, or by how far they are from the others: the middle ones are nearest to all."""
    small = torchopt.shrink(ramp(), (torch.randn(2, 1),), ratio=0.5, importance=importance, round_to=1)
    assert small[0].weight.flatten().tolist() == left
    assert small[2].weight.flatten().tolist() == left


def test_taylor_keeps_the_channels_that_matter():
    model = S(C(1, 16, 1, bias=False), C(16, 2, 1, bias=False)).eval()
    with torch.no_grad():
        model[1].weight[:, :8] = 0  # the first eight channels reach no output
    x = torch.randn(4, 1, 3, 3)
    model(x).square().sum().backward()
    torch.testing.assert_close(torchopt.shrink(model, (x,), ratio=0.5, importance="taylor")(x), model(x))
    with pytest.raises(torchopt.StateError, match=r"importance='taylor' reads gradients, and 0\.weight has none; run backward"):
        torchopt.shrink(conv_net(), (IMAGE,), ratio=0.5, importance="taylor")


def test_a_width_without_batch_norm_is_not_ranked_by_its_scale():
    small = torchopt.shrink(conv_net(), (IMAGE,), ratio=0.5, importance="bn_scale")
    assert (small[0].out_channels, small[4].out_channels) == (16, 64)
    assert [(s.name, s.reason) for s in skipped_of(small)] == [
        ("4", "keeps its channels: nothing in its group can be ranked by importance='bn_scale'")
    ]


def widths(model: nn.Module) -> list[int]:
    return [module.out_features for module in model if isinstance(module, L)]


def three_widths() -> nn.Module:
    """Eight even channels; four strong and four weak ones; the same before a norm."""
    model = S(L(1, 8, bias=False), L(8, 8, bias=False), L(8, 8, bias=False), nn.LayerNorm(8), L(8, 1, bias=False)).eval()
    uneven = torch.tensor([1.0, 1, 1, 1, 0.01, 0.01, 0.01, 0.01])
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.copy_(uneven[:, None].expand(8, 8))
        model[2].weight.copy_(uneven[:, None] * uneven)
        model[4].weight.copy_(uneven[None])
    return model


def test_global_ranking_shrinks_some_widths_more_than_others():
    x = torch.randn(2, 1)
    assert widths(torchopt.shrink(three_widths(), (x,), ratio=1 / 3, round_to=1)) == [5, 5, 5, 1]
    assert widths(torchopt.shrink(three_widths(), (x,), ratio=1 / 3, round_to=1, global_ranking=True)) == [
        8,
        4,
        4,
        1,
    ]  # 16 of 24 are left
    assert widths(torchopt.shrink(three_widths(), (x,), ratio=1 / 3, round_to=4, global_ranking=True)) == [8, 4, 4, 1]


def test_isomorphic_ranking_shrinks_each_kind_by_the_ratio():
    """Two kinds of width: between linear layers (8 + 8 channels), and before a norm (8)."""
    x = torch.randn(2, 1)
    channels = Channels(three_widths(), (x,))
    assert len({group.structure for group in channels.groups}) == 2
    assert widths(channels.without(0.25, round_to=1, isomorphic=True)) == [8, 4, 6, 1]
    assert widths(channels.without(0.25, round_to=1, isomorphic=True, global_ranking=True)) == [8, 4, 6, 1]
    assert widths(channels.without(0.25, round_to=1)) == [6, 6, 6, 1]


def group(count: int, unit: int = 1, name: str = "a") -> Group:
    return Group(axes={}, labels=np.arange(count), layers=(name,), structure=(), unit=unit)


@pytest.mark.parametrize(
    ("count", "unit", "ratio", "round_to", "left"),
    [
        (64, 1, 0.5, 8, 32), (64, 1, 0.3, 8, 40), (64, 1, 0.3, 1, 44), (58, 1, 0.5, 8, 24), (24, 1, 0.9, 16, 16), (12, 1, 0.9, 16, 12),
        (64, 1, 0.99, 16, 16), (64, 1, 0.0, 16, 64), (58, 1, 0.0, 16, 58), (12, 64, 0.5, 16, 6), (12, 4, 0.5, 16, 4), (10, 1, 0.9, 1, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ranked", [{"global_ranking": False}, {"global_ranking": True}])
def test_how_many_channels_stay(count, unit, ratio, round_to, left, ranked):
    """A multiple of `round_to` features, at least one multiple, and all of a group that is smaller: none is rounded to nothing."""
    options = {"round_to": round_to, "isomorphic": False, "ratios": {}, **ranked}
    (gone,) = choose([group(count, unit)], [np.arange(count) + 1.0], ratio, **options)
    assert count - int(gone.sum()) == left
    assert not gone[count - left :].any() or left == count


def test_global_ranking_never_empties_a_width():
    ranks = [np.full(32, 1e-6), np.arange(1.0, 65)]
    options = {"global_ranking": True, "isomorphic": False, "ratios": {}}
    left = [int((~gone).sum()) for gone in choose([group(32), group(64)], ranks, 0.5, round_to=8, **options)]
    assert left == [8, 40]  # 48 of 96 are left, and one multiple of the width that matters least
    left = [int((~gone).sum()) for gone in choose([group(32), group(64)], ranks, 0.95, round_to=8, **options)]
    assert left == [8, 8]


def test_a_ratio_given_by_name_reaches_the_whole_group_from_any_of_its_layers():
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    channels = Channels(model, (x,))
    expand, depthwise = "features.3.conv.0.0", "features.3.conv.1.0"  # 144 channels of each
    for name in (expand, depthwise):
        small = channels.without(0.0, round_to=8, ratios={name: 0.5})
        assert [small.get_submodule(n).out_channels for n in (expand, depthwise)] == [72, 72]
        assert small.features[4].conv[0][0].out_channels == 144
    assert channels.without(0.5, ratios={expand: 0.25, depthwise: 0.0}).features[3].conv[0][0].out_channels == 144  # the smallest
    with pytest.raises(torchopt.RuleError, match=r"ratios names 'features\.3\.conv', no layer whose channels can go"):
        channels.without(0.5, ratios={"features.3.conv": 0.5})


def test_a_cut_in_the_wrong_place_is_seen():
    torch.manual_seed(0)
    model = S(L(4, 6), L(6, 3)).eval()
    x = (torch.randn(2, 4),)
    right = {("0.weight", 0): np.array([1, 2]), ("0.bias", 0): np.array([1, 2]), ("1.weight", 1): np.array([1, 2])}
    wrong = right | {("1.weight", 1): np.array([0, 2])}
    short = right | {("1.weight", 1): np.array([1])}
    assert Proof(model, x).problem(right, [], [partial(cut, removed=right)]) == ("", 0)
    assert Proof(model, x).problem(wrong, [], [partial(cut, removed=wrong)]) == (
        "what is computed from them does not follow when some are removed",
        -1,
    )
    problem, _ = Proof(model, x).problem(short, [], [partial(cut, removed=short)])
    assert problem.startswith("the network does not run without some of them (")
    assert Proof(model, x).problem(right, [], [lambda whole: None, partial(cut, removed=right)]) == ("", 1)


def test_a_branch_that_starts_at_zero_does_not_hide_a_wrong_cut():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.a, self.b, self.scale = L(4, 3), L(4, 6), L(6, 3), nn.Parameter(torch.full((3,), 1e-6))

        def forward(self, x):
            return self.head(x) + self.scale * self.b(self.a(x))

    model = Residual().eval()
    wrong = {("a.weight", 0): np.array([1]), ("a.bias", 0): np.array([1]), ("b.weight", 1): np.array([0])}
    assert Proof(model, (torch.zeros(2, 4),)).problem(wrong, [], [partial(cut, removed=wrong)])[1] == -1


def test_identities_join_and_fix():
    ids = Identities()
    a, b, c = ids.fresh(3), ids.fresh(3), ids.fresh(2)
    ids.join(a, b, "")
    ids.join(b[1:], c, "")
    ids.join(c, np.array([0, c[1]]), "meets the edge")
    labels, reasons = ids.components()
    assert labels[a].tolist() == labels[b].tolist()
    assert labels[a[1]] == labels[c[0]]
    assert len({*labels[a]}) == 3
    assert reasons[int(labels[a[1]])] == "meets the edge"
    assert int(labels[a[0]]) not in reasons


def test_multiply_adds():
    assert count_macs(C(3, 8, 3, padding=1, bias=False), (torch.zeros(1, 3, 4, 4),)) == (3 * 8 * 9 * 16, 216)
    assert count_macs(nn.LSTM(4, 8, bias=False), (torch.zeros(5, 1, 4),))[0] == 5 * (4 * 8 * 4 + 4 * 8 * 8)
