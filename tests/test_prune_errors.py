"""Bad input says where, what and what would be right, and leaves the model as it was (P11, P13, P26, P28)."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from torchopt.errors import ConfigError, ModelError, RuleError, StateError
from torchopt.network.weights import find_weight, weights
from torchopt.prune import Prune, attach, bake, finish, mask_of, update
from torchopt.prune.schedule import ConstantSparsity, PolynomialDecay


def pairs(model: nn.Module, config: Prune):
    return [(w, config) for w in weights(model)]


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 2, float("nan")])
def test_sparsity_outside_zero_to_one(sparsity):
    with pytest.raises(ConfigError, match=r"Prune\.schedule: got .*; a fraction of zeros in \[0, 1\) is needed, such as 0\.8"):
        Prune(schedule=sparsity)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"Prune\.schedule: got None; a sparsity such as 0\.8, or a schedule"),
        ({"schedule": "0.5"}, r"Prune\.schedule: got '0\.5'; a sparsity"),
        ({"schedule": True}, r"Prune\.schedule: got True; a fraction"),
        (
            {"schedule": 0.5, "pattern": "elements"},
            r"Prune\.pattern: got 'elements'; one of element, block.*did you mean 'element'\?",
        ),
        ({"schedule": 0.5, "pattern": 4}, r"Prune\.pattern: got 4; one of"),
        ({"schedule": 0.5, "scope": "model"}, r"Prune\.scope: got 'model'; one of layer, global, coupled is needed"),
        ({"schedule": 0.5, "score": "magnitud"}, r"Prune\.score: got 'magnitud'; .*did you mean 'magnitude'\?"),
        ({"schedule": 0.5, "seed": -1}, r"Prune\.seed: got -1; a whole number of at least 0"),
        ({"schedule": 0.5, "pattern": "block"}, r"Prune\.block_size: got \(1, 1\) with pattern='block'; give a larger block"),
        ({"schedule": 0.5, "block_size": (2, 2)}, r"Prune\.block_size: got \(2, 2\) with pattern='element'; add pattern='block'"),
        ({"schedule": 0.5, "pattern": "block", "block_size": (0, 2)}, r"Prune\.block_size: got \(0, 2\); two whole numbers"),
        ({"schedule": 0.5, "pattern": "block", "block_size": 4}, r"Prune\.block_size: got 4; two whole numbers"),
        ({"schedule": 0.5, "n": 2, "m": 4}, r"Prune\.n: got n=2, m=4 with pattern='element'; add pattern='n:m'"),
        ({"pattern": "n:m"}, r"Prune\.n: got n=None, m=None; n of every m weights are kept, so 1 <= n < m is needed"),
        ({"pattern": "2:4", "n": 2}, r"Prune\.pattern: got '2:4' and n=2, m=None; give the ratio once"),
        ({"pattern": "2:4", "scope": "global"}, r"Prune\.scope: got 'global' with pattern='n:m'"),
        (
            {"pattern": "1:4", "schedule": 0.5},
            r"Prune\.schedule: ends at sparsity 0\.5, but 1 kept of every 4 is 0\.75; end at that",
        ),
        ({"schedule": 0.5, "min_keep": 0.1}, r"Prune\.min_keep: got 0\.1 with scope='layer'; add scope='global'"),
        (
            {"schedule": 0.8, "scope": "global", "min_keep": 0.3},
            r"Prune\.min_keep: got 0\.3, which forbids a sparsity of 0\.8; at most 0\.2 is",
        ),
        ({"schedule": 0.8, "scope": "global", "min_keep": -1}, r"Prune\.min_keep: got -1; a fraction"),
        ({"schedule": 0.5, "only_where_faster": "xnnpack"}, r"Prune\.only_where_faster: got 'xnnpack'; one of ort-x86"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Prune(**fields)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("ratio", ["4:4", "5:4", "0:4"])
def test_P13_n_must_be_less_than_m(ratio):
    n, m = ratio.split(":")
    with pytest.raises(ConfigError, match=rf"Prune\.n: got n={n}, m={m}; .*1 <= n < m"):
        Prune(pattern=ratio)


def test_P11_pooling_is_avg_or_max():
    with pytest.raises(ConfigError, match=r"Prune\.block_pooling: got 'MIN'; one of AVG, MAX is needed"):
        Prune(schedule=0.5, pattern="block", block_size=(2, 2), block_pooling="MIN")


@pytest.mark.parametrize(
    "fields", [{"pattern": "block", "block_size": (1, 4)}, {"pattern": "2:4", "schedule": None}, {"pattern": "channel"}]
)
def test_P11_P13_patterns_need_two_dimensions(fields):
    """Rank 3 is a Conv1d here, which has a matrix view; rank 1 has none."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

    model = nn.Sequential(nn.Linear(8, 8), Scale())
    before = model.state_dict().keys()
    config = Prune(**{"schedule": 0.5, **fields})
    with pytest.raises(RuleError, match=r"1\.gain: has 1 dimension, and pattern='.*' needs at least 2 .*use pattern='element'"):
        attach([*pairs(model, config), (find_weight(model, "1.gain"), config)], preserve=True)
    assert model.state_dict().keys() == before
    assert not torch_prune.is_pruned(model)


def test_a_second_mask_is_refused_and_the_model_unchanged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[1], "weight", amount=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        StateError, match=r"1\.weight: carries a mask already; finalize the model, or call torch\.nn\.utils\.prune\.remove"
    ):
        attach(pairs(model, Prune(schedule=0.5)), preserve=True)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_torch_pruning_cannot_be_stacked_on_ours_by_its_interface():
    from torchopt.prune.mask import Mask

    layer = nn.Linear(4, 4)
    with pytest.raises(StateError, match=r"masks of torchopt are put on by torchopt\.prepare"):
        Mask.apply(layer, "weight", weights(layer)[0], Prune(schedule=0.5))
    assert sorted(layer.state_dict()) == ["bias", "weight"]


def test_a_foreign_mask_on_top_of_ours_is_refused_at_the_next_update():
    """torch wraps both in a container, in which ours would never be advanced again."""
    layer = nn.Linear(4, 4)
    attach(pairs(layer, Prune(schedule=0.5)), preserve=True)
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(
        StateError, match=r"Linear\.weight: another mask of torch\.nn\.utils\.prune was put over torchopt's; remove it"
    ):
        update(layer, 1)


def test_removing_a_mask_from_over_a_table_is_refused():
    layer = nn.Linear(4, 4)
    attach(pairs(layer, Prune(schedule=0.5)), preserve=True)
    nn.utils.parametrize.register_parametrization(layer, "weight_orig", nn.Identity())
    with pytest.raises(StateError, match=r"weight: shared values stand under the mask; call torchopt\.finalize"):
        bake(layer)


def test_what_is_skipped_is_returned_with_the_reason():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Linear(1, 8), nn.Linear(1, 1), nn.Embedding(4, 4)
    )
    skipped = attach(pairs(model, Prune(pattern="2:4")), preserve=True)
    assert [(s.name, s.technique) for s in skipped] == [("0.weight", "prune"), ("3.weight", "prune"), ("4.weight", "prune")]
    assert skipped[0].reason.startswith("is a depthwise convolution")
    assert skipped[1].reason == "has 1 input channel, of which 2:4 keeps all"
    assert skipped[2].reason == "is a single number, and the last weight of a tensor is kept"
    assert [name for name, buffer in model.named_buffers() if name.endswith("_mask")] == ["1.weight_mask", "5.weight_mask"]


def test_depthwise_convolutions_are_pruned_when_asked_for():
    model = nn.Conv2d(4, 4, 3, groups=4)
    assert attach(pairs(model, Prune(schedule=0.5, include_depthwise=True)), preserve=True) == []
    finish(model)
    assert int(model.weight_mask.sum()) == 18


def test_other_reasons_to_skip():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Embedding(4, 4), nn.LSTM(4, 4))
    plain, single, *others = weights(model)
    channel, wanda = Prune(schedule=0.5, pattern="channel"), Prune(schedule=0.5, score="wanda")
    skipped = attach([(plain, wanda), (single, channel), *((w, wanda) for w in others)], preserve=True)
    assert (skipped[0].name, skipped[0].reason) == ("1.weight", "has a single output channel")
    assert [s.name for s in skipped] == ["1.weight", "2.weight", "3.weight_ih_l0", "3.weight_hh_l0"]
    assert all("is not multiplied with its module's input" in s.reason for s in skipped[1:])


def test_a_parameter_given_twice_is_pruned_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    given = [(find_weight(model, name), Prune(schedule=0.5)) for name in ("0.weight", "1.weight")]
    (skipped,) = attach(given, preserve=True)
    assert (skipped.name, skipped.reason) == ("1.weight", "is the same Parameter as 0.weight")


def test_P28_the_latency_policy_says_what_onnx_runtime_gains():
    """Masked elements run no faster in ONNX Runtime; whole channels, once removed, do."""
    conv, pointwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
    elements = Prune(schedule=0.5, only_where_faster="ort-x86")
    channels = Prune(schedule=0.5, pattern="channel", only_where_faster="ort-x86")
    model = nn.Sequential(conv, pointwise)
    first, second = weights(model)
    (skipped,) = attach([(first, elements), (second, channels)], preserve=True)
    assert skipped.name == "0.weight"
    assert skipped.reason.startswith("would run no faster on ort-x86, which computes zeros like any other weight; prune channels")
    finish(model)
    assert mask_of(first) is None
    assert int(mask_of(second).sum()) == 32
    with pytest.raises(RuleError, match=r"prune: nothing is left to prune; 0\.weight would run no faster on ort-x86"):
        attach(pairs(nn.Sequential(nn.Conv2d(3, 8, 3)), elements), preserve=True)


def test_public_verbs_refuse_frozen_and_missing_parameters_and_leave_the_model_unchanged():
    import torchopt

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuleError, match=r"matches no module that owns a weight"):
        torchopt.prepare(model, [torchopt.Rule("2", prune=Prune(schedule=0.5))])
    with pytest.raises(RuleError, match=r"rule 1 .*: no module has a parameter 'kernel'"):
        torchopt.prepare(model, [torchopt.Rule("*", params=["kernel"], prune=Prune(schedule=0.5)), torchopt.Rule("0")])
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuleError, match=r"0\.weight is frozen"):
        torchopt.prepare(model, [torchopt.Rule("0", prune=Prune(schedule=0.5))])
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"1\.weight holds NaN"):
        torchopt.prepare(model, [torchopt.Rule("*", prune=Prune(schedule=0.5))])
    before["1.weight"][0, 0] = float("nan")
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in model.state_dict().items())


def test_equal_configurations_are_equal_and_hashable():
    make = lambda: Prune(schedule=PolynomialDecay(final_sparsity=0.8, end_step=10), pattern="block", block_size=[2, 4])
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make().block_size == (2, 4)
    assert Prune(schedule=0.5).schedule == ConstantSparsity(target_sparsity=0.5)


def test_a_ratio_in_a_recipe_needs_no_quotes():
    """YAML 1.1 takes 2:4 for a number to the base of 60."""
    from torchopt.recipe import parse

    text = "model: {kind: resnet8, classes: 10}\ndata: {kind: digits}\nstages:\n  - compress: [{match: '*', prune: {pattern: 2:4}}]\n"
    (rule,) = parse(text).recipe.stages[0].compress
    assert rule.prune == Prune(pattern="2:4")
