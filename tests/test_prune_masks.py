"""Which weights survive: exact counts, ties, blocks, n:m groups, channels and one ranking over all layers (P7–P15 and beyond)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchopt.errors import ModelError
from torchopt.fast.zero import BLOCK, zero_
from torchopt.network.weights import weights
from torchopt.prune import Prune, attach, finish, mask_of, update
from torchopt.prune.pattern import conforms, largest_of_groups, pool_blocks, spread
from torchopt.prune.schedule import ConstantSparsity, MultiStep
from torchopt.prune.select import SMALL, Scores, keep_largest, kth_largest


def matrix(values) -> nn.Linear:
    """A linear layer without bias that holds these weights."""
    values = torch.as_tensor(values, dtype=torch.float32)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight.data = values.clone()
    return layer


def masked(model: nn.Module, config: Prune, *, preserve: bool = False) -> list[torch.Tensor]:
    """Prune at once and return the masks."""
    attach([(w, config) for w in weights(model)], preserve=preserve)
    finish(model)
    return [mask_of(w) for w in weights(model)]


@pytest.mark.parametrize(("sparsity", "left"), [(0.5, 50), (0.9999, 1), (0.0, 100), (0.01, 99)])
def test_P7_counts_are_exact_and_never_zero(sparsity, left):
    (mask,) = masked(matrix(torch.arange(1, 101).reshape(10, 10)), Prune(schedule=sparsity))
    assert int(mask.sum()) == left
    np.testing.assert_array_equal(mask.flatten().numpy(), np.arange(1, 101) > 100 - left)


def test_P8_two_of_ten():
    (mask,) = masked(matrix(torch.arange(1, 11).reshape(1, 10)), Prune(schedule=0.2))
    assert mask.tolist() == [[False] * 2 + [True] * 8]


def test_P9_targets_one_after_the_other():
    targets = [0, 0.1, 0.1, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5]
    layer = matrix(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
    attach([(w, Prune(schedule=MultiStep(milestones=range(1, 11), sparsities=targets))) for w in weights(layer)], preserve=False)
    left = []
    for step in range(1, 11):
        update(layer, step)
        left.append(int(layer.weight_mask.sum()))
    assert left == [100, 90, 90, 70, 70, 50, 50, 50, 50, 50]


@pytest.mark.parametrize("pooling", ["AVG", "MAX"])
def test_P10_blocks_of_two_by_two(pooling):
    block = torch.ones(2, 2) if pooling == "AVG" else torch.diag(torch.tensor([1.0, -1.0]))
    weight = torch.kron(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), block)
    (mask,) = masked(matrix(weight), Prune(schedule=0.5, pattern="block", block_size=(2, 2), block_pooling=pooling))
    assert mask.tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (6, 6), (1, 4), (4, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("pooling", ["AVG", "MAX"])
def test_P12_pooling_and_spreading_equal_the_definition(size, pooling):
    height, width = size
    values = torch.rand(1024, 2048, generator=torch.Generator().manual_seed(0))
    rows, columns = math.ceil(1024 / height), math.ceil(2048 / width)
    padded = np.full((rows * height, columns * width), np.nan, dtype=np.float64)
    padded[:1024, :2048] = values.numpy()
    reduce = np.nanmean if pooling == "AVG" else np.nanmax
    expected = reduce(padded.reshape(rows, height, columns, width), axis=(1, 3))
    got = pool_blocks(values, size, pooling)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)

    decisions = got > got.median()
    config = Prune(schedule=0.5, pattern="block", block_size=size) if size != (1, 1) else None
    if config is not None:
        kronecker = torch.kron(decisions.to(torch.uint8), torch.ones(size, dtype=torch.uint8)).bool()[:1024, :2048]
        assert torch.equal(spread(decisions, values.shape, config, 0), kronecker)


def test_blocks_of_a_convolution_run_over_its_matrix_view():
    conv = nn.Conv2d(4, 6, 3, bias=False)
    (mask,) = masked(conv, Prune(schedule=0.5, pattern="block", block_size=(2, 6)))
    blocks = mask.flatten(1).reshape(3, 2, 6, 6).movedim(1, 2).flatten(2)  # (rows, columns, elements of a block)
    alive = blocks.float().mean(dim=2)
    assert sorted(alive.unique().tolist()) == [0.0, 1.0]
    assert int(alive.sum()) == 9


EXAMPLE = [[0.25, -1.33, 0.43, -0.11], [0.47, 0.92, -0.13, -2.23]]
RAGGED = [[-0.49, -0.66, 0.42], [0.31, 0.63, -1.63]]
FIVES = [[1.71, -0.27, -0.3, -0.61, -0.19], [-0.4, 1.12, 0.46, -1.12, 0.17]]


@pytest.mark.parametrize(
    ("values", "pattern", "expected"),
    [
        (EXAMPLE, "2:4", [[0, 1, 1, 0], [0, 1, 0, 1]]),
        (RAGGED, "2:4", [[1, 1, 0], [0, 1, 1]]),
        (RAGGED, "1:2", [[0, 1, 1], [0, 1, 1]]),
        (FIVES, "2:5", [[1, 0, 0, 1, 0], [0, 1, 0, 1, 0]]),  # TFMOT's sparsity_m_by_n=(3, 5): it counts the zeros
        (FIVES, "3:5", [[1, 0, 1, 1, 0], [0, 1, 1, 1, 0]]),  # n counts the weights that are kept
    ],
)
def test_P13_n_of_every_m_are_kept(values, pattern, expected):
    (mask,) = masked(matrix(values), Prune(pattern=pattern))
    assert mask.int().tolist() == expected


def test_P13_n_and_m_as_fields_are_the_same_as_the_short_form():
    assert Prune(pattern="2:5") == Prune(pattern="n:m", n=2, m=5)
    assert Prune(pattern="2:5").timing.final == pytest.approx(0.6)  # TFMOT's (3, 5): 3 zeros of 5


@pytest.mark.parametrize(
    ("module", "pattern", "sparsity"),
    [
        (nn.Conv2d(8, 16, (5, 7)), "2:4", 0.5),
        (nn.Conv2d(7, 16, (5, 7)), "2:4", 3 / 7),
        (nn.Linear(8, 16), "2:4", 0.5),
        (nn.Linear(8, 16), "1:2", 0.5),
        (nn.Conv1d(8, 16, 3), "2:4", 0.5),
        (nn.Conv3d(8, 16, 3), "1:4", 0.75),
        (nn.ConvTranspose2d(8, 16, 3), "2:4", 0.5),
        (nn.Embedding(10, 8), "2:4", 0.5),
    ],
)
def test_P14_sparsity_of_n_m(module, pattern, sparsity):
    (mask,) = masked(module, Prune(pattern=pattern))
    assert 1 - mask.float().mean().item() == pytest.approx(sparsity, abs=1e-6)


def test_P14_conformance():
    assert not conforms(torch.tensor([[1.0, 2, 0, 0, 5, 6, 7]]), 2, 4)
    assert conforms(torch.tensor([[1.0, 2, 0, 0, 5, 6, 0]]), 2, 4)


@pytest.mark.parametrize(
    ("module", "axis"),
    [(nn.Conv2d(8, 4, 3), 1), (nn.Linear(12, 5), 1), (nn.ConvTranspose2d(8, 4, 3), 0), (nn.Conv1d(10, 4, 3), 1)],
)
def test_P15_groups_run_along_input_channels(module, axis):
    masked(module, Prune(pattern="2:4"))
    assert conforms(module.weight, 2, 4, in_axis=axis)
    assert not conforms(module.weight, 1, 4, in_axis=axis)


def test_P15_groups_may_fill_up_gradually():
    layer = matrix(torch.randn(4, 16))
    config = Prune(pattern="1:4", schedule=MultiStep(milestones=(1, 2, 3), sparsities=(0.25, 0.5, 0.75)))
    attach([(w, config) for w in weights(layer)], preserve=False)
    for step, kept in ((1, 3), (2, 2), (3, 1)):
        update(layer, step)
        assert conforms(layer.weight, kept, 4)
        assert layer.weight_mask.sum().item() == 16 * kept


def test_equal_members_of_a_group_are_cut_to_the_first():
    assert largest_of_groups(torch.ones(1, 5), 2, 4, 1).tolist() == [[True, True, False, False, True]]


def test_ties_are_cut_to_the_exact_count():
    """TFMOT keeps all ties: a tensor of equal weights stays dense at target 50 % (after clustering, say)."""
    (mask,) = masked(matrix(torch.full((10, 10), 0.3)), Prune(schedule=0.5))
    assert mask.flatten().tolist() == [True] * 50 + [False] * 50


def test_half_is_rounded_to_even_as_tensorflow_does():
    (mask,) = masked(matrix([[1.0, 2, 3, 4, 5]]), Prune(schedule=0.5))
    assert int(mask.sum()) == 2


@pytest.mark.parametrize("keep_share", [0.5, 0.1, 0.9, 0.001])
@pytest.mark.parametrize("make", ["normal", "clustered", "sorted", "periodic", "zeros"])
def test_selection_equals_a_full_sort(make, keep_share):
    """Above 65536 scores the threshold comes from a sampled bracket; whatever the data, the choice is that of a stable sort."""
    generator = torch.Generator().manual_seed(1)
    sizes, total = [90_000, 7, 200_003, 30_000], 320_010
    values = {
        "normal": torch.randn(total, generator=generator),
        "clustered": torch.randint(-8, 8, (total,), generator=generator) / 8,
        "sorted": torch.linspace(-1, 1, total),
        "periodic": torch.arange(total) % 9.0,
        "zeros": torch.cat([torch.zeros(total - 1000), torch.randn(1000, generator=generator)]),
    }[make]
    assert total > SMALL
    keep = round(total * keep_share)
    order = np.argsort(-values.abs().numpy(), kind="stable")[:keep]
    expected = np.zeros(total, dtype=bool)
    expected[order] = True
    entries = [Scores(name=str(i), values=part, absolute=True) for i, part in enumerate(values.split(sizes))]
    got = np.concatenate([mask.numpy() for mask in keep_largest(entries, keep, floors=[0] * 4)])
    np.testing.assert_array_equal(got, expected)
    assert kth_largest(entries, keep) == values.abs()[order[-1]].item()


def test_global_ranking_is_one_ranking():
    model = nn.Sequential(matrix(torch.arange(1, 9).reshape(2, 4)), matrix(torch.arange(5, 13).reshape(2, 4)))
    first, second = masked(
        model, Prune(schedule=7 / 16, scope="global")
    )  # 9 survive: 12 11 10 9 8 8 7 7, and the first of the two 6
    assert first.flatten().tolist() == [False] * 5 + [True] * 3
    assert second.flatten().tolist() == [False] * 2 + [True] * 6


def test_global_ranking_leaves_each_tensor_its_last_weight():
    model = nn.Sequential(matrix(torch.full((2, 2), 1e-3)), matrix(torch.rand(4, 4) + 1), matrix([[1e-4, -2e-4]]))
    masks = masked(model, Prune(schedule=0.9, scope="global"))
    assert [int(mask.sum()) for mask in masks] == [1, 1, 1]  # round(22 · 0.1) = 2 is raised to one each
    assert masks[2].tolist() == [[False, True]]


def test_global_ranking_keeps_a_floor_in_each_tensor():
    model = nn.Sequential(matrix(torch.full((5, 4), 1e-3)), matrix(torch.rand(10, 8) + 1))
    masks = masked(model, Prune(schedule=0.5, scope="global", min_keep=0.25))
    assert [int(mask.sum()) for mask in masks] == [5, 45]


def test_two_global_rules_are_two_rankings():
    model = nn.Sequential(matrix(torch.ones(4, 4) * 9), matrix(torch.rand(4, 4)))
    first, second = weights(model)
    attach([(first, Prune(schedule=0.5, scope="global")), (second, Prune(schedule=0.75, scope="global"))], preserve=False)
    finish(model)
    assert [int(mask_of(w).sum()) for w in weights(model)] == [8, 4]


@pytest.mark.parametrize(
    ("module", "axis"), [(nn.Conv2d(3, 8, 3), 0), (nn.Linear(6, 8), 0), (nn.ConvTranspose2d(3, 8, 3), 1), (nn.Conv1d(2, 8, 3), 0)]
)
def test_channels_are_pruned_whole(module, axis):
    means = module.weight.detach().abs().movedim(axis, 0).flatten(1).mean(dim=1)
    (mask,) = masked(module, Prune(schedule=0.75, pattern="channel"))
    alive = mask.movedim(axis, 0).flatten(1)
    assert torch.equal(alive.all(dim=1), alive.any(dim=1))
    assert sorted(torch.nonzero(alive[:, 0]).flatten().tolist()) == sorted(means.topk(2).indices.tolist())


def test_channels_are_ranked_over_layers():
    model = nn.Sequential(matrix(torch.ones(4, 4)), matrix(torch.full((4, 4), 2.0)))
    masks = masked(model, Prune(schedule=0.25, pattern="channel", scope="global"))
    assert [int(mask[:, 0].sum()) for mask in masks] == [2, 4]


def test_random_masks_follow_the_seed_and_are_nested():
    def at(sparsity, seed):
        return masked(matrix(torch.ones(20, 20)), Prune(schedule=sparsity, score="random", seed=seed))[0]

    assert torch.equal(at(0.5, 0), at(0.5, 0))
    assert not torch.equal(at(0.5, 0), at(0.5, 1))
    assert int(at(0.5, 0).sum()) == 200
    assert bool((at(0.8, 3) <= at(0.5, 3)).all())


def test_random_masks_differ_between_layers():
    model = nn.Sequential(matrix(torch.ones(20, 20)), matrix(torch.ones(20, 20)))
    first, second = masked(model, Prune(schedule=0.5, score="random"))
    assert not torch.equal(first, second)


def test_preserved_zeros_count_and_never_come_back():
    layer = matrix([[0.0, 5, 4, 0], [3, 2, 1, 6]])
    attach([(w, Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1))) for w in weights(layer)], preserve=True)
    assert layer.weight_mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    layer.weight_orig.data[0, 0] = 100.0  # an optimizer drags it away from zero
    update(layer, 1)
    assert layer.weight_mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert layer.weight.tolist() == [[0, 5, 4, 0], [3, 0, 0, 6]]


def test_without_preserve_a_zero_may_come_back():
    layer = matrix([[0.0, 5, 4, 0]])
    attach([(w, Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1))) for w in weights(layer)], preserve=False)
    layer.weight_orig.data[0, 0] = 100.0
    update(layer, 1)
    assert layer.weight_mask.int().tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer = nn.Linear(64, 64, dtype=dtype)
    (mask,) = masked(layer, Prune(schedule=0.75))
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == 1024
    assert layer.weight.dtype == dtype
    kept, gone = layer.weight_orig.detach().abs()[mask].min(), layer.weight.detach()[~mask]
    assert kept > 0
    assert not gone.any()


@pytest.mark.parametrize("where", ["alive", "masked"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_weights_are_an_error_that_names_them(where, value):
    layer = matrix(torch.arange(1.0, 9).reshape(2, 4))
    attach([(w, Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1))) for w in weights(layer)], preserve=False)
    update(layer, 1)
    layer.weight_orig.data[(1, 3) if where == "alive" else (0, 0)] = value
    with pytest.raises(ModelError, match=r"weight: holds NaN or infinity after an optimizer step; .*lower the learning rate"):
        update(layer, 2)


def test_a_score_that_is_nan_is_an_error():
    broken = Scores(name="conv.weight", values=torch.tensor([1.0, math.nan, 3.0]))
    with pytest.raises(ModelError, match=r"conv\.weight: a score is NaN"):
        keep_largest([broken], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (3, 5), (2, 3, 4, 5), (BLOCK + 7,), (3, BLOCK)], ids=lambda shape: "×".join(map(str, shape))
)
def test_zeros_in_place_equal_a_product_and_are_positive(shape, dtype):
    weight, mask = torch.randn(shape, dtype=dtype), torch.rand(shape) > 0.5
    expected, where, version = torch.where(mask, weight, 0.0), weight.data_ptr(), weight._version
    assert zero_(weight, mask) is weight
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    assert not torch.signbit(weight[~mask]).any()
    assert (weight.data_ptr(), weight._version > version) == (where, weight.numel() > 0)


def test_zeros_in_place_in_other_layouts():
    weight, mask = torch.randn(8, 4, 3, 3), torch.rand(8, 4, 3, 3) > 0.5
    expected, last = torch.where(mask, weight, 0.0), torch.channels_last
    for laid in (weight.contiguous(memory_format=last), weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for kept in (mask, mask.contiguous(memory_format=last)):
            torch.testing.assert_close(zero_(laid.clone(), kept), expected, rtol=0, atol=0)
