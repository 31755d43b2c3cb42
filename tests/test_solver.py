"""The layerwise solver against rounding to nearest, coordinate descent from many starts, and exhaustive search."""

import itertools
import statistics

import pytest
import torch
from torch import nn

from torchopt.errors import ModelError
from torchopt.solver import Grid, Problem, Table, aimed, error, fit_table, fix_zeros, moments, round_to
from torchopt.solver.polish import errors, polish
from torchopt.solver.positions import as_rows, from_rows
from torchopt.solver.sweep import damped


def layer(number: int, rows: int, inputs: int, samples: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights and the moments of correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(number)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(samples or 4 * inputs, inputs, generator=generator) @ mix + torch.rand(inputs, generator=generator) / 2
    return torch.randn(1, rows, inputs, generator=generator), (x.T @ x / len(x))[None]


def values_of(problem: Problem, kind: str, count: int = 8) -> Grid | Table:
    rows = problem.w.shape[1]
    if kind == "grid":
        return Grid(scale=problem.w.abs().amax(2, keepdim=True) / (count // 2 - 1), low=1 - count // 2, high=count // 2 - 1)
    entries = torch.quantile(problem.w.flatten(), torch.linspace(0.05, 0.95, count).double())
    return Table(entries=entries.expand(1, rows, count), scale=torch.ones(1, rows, 1).double())


def descent(problem: Problem, values: Grid | Table, starts: int = 10) -> float:
    """Coordinate descent: the best of so many random starts for the whole layer."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(starts):
        noise = torch.randn(problem.w.shape, generator=generator, dtype=problem.w.dtype)
        start = values.nearest(problem.w + problem.w.std() / 2 * noise)
        found.append(error(problem, polish(problem.w, start, problem.h, values, rounds=50)))
    return min(found)


def test_over_a_hundred_layers_it_is_never_above_nearest_and_in_the_median_not_above_coordinate_descent():
    ratios = []
    for number in range(100):
        kind = ("grid", "table")[number % 2]
        problem = Problem.of(*layer(number, 4, (8, 12, 40)[number % 3]))
        values = values_of(problem, kind)
        ours, nearest = (errors(problem.w, given, problem.h) for given in (round_to(problem, values), values.nearest(problem.w)))
        assert bool((ours <= nearest).all())
        ratios.append(float(ours.sum()) / descent(problem, values))
    assert statistics.median(ratios) <= 1


@pytest.mark.parametrize(("rows", "inputs", "count"), [(1, 8, 3), (2, 4, 4), (1, 6, 4), (2, 3, 2)])
def test_on_few_weights_it_is_within_a_twentieth_of_exhaustive_search(rows, inputs, count):
    for number in range(5):
        problem = Problem.of(*layer(number, rows, inputs))
        values = values_of(problem, "table", count)
        every = values.entries[0, 0][torch.tensor(list(itertools.product(range(count), repeat=inputs)))]
        difference = problem.w[0][:, None] - every
        least = float(((difference @ problem.h[0]) * difference).sum(2).amin(1).sum())
        assert error(problem, round_to(problem, values)) <= 1.05 * least


@pytest.mark.parametrize("inputs", [9, 48])
def test_a_fitted_table_has_its_values_keeps_its_zeros_and_beats_the_one_it_began_with(inputs):
    w, h = layer(3, 16, inputs)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    problem = Problem.of(w, h, keep)
    start = torch.tensor([-1.0, -0.4, 0.0, 0.4, 1.0])
    entries, _, codes, given = fit_table(problem, start, torch.ones(1, 16, 1), pinned=True)
    assert len(entries) == 5
    assert float(entries.abs().min()) == 0
    assert torch.equal(given, entries[codes])
    assert not bool(given[~keep].any())
    nearest = Table(entries=start.double().expand(1, 16, 5), scale=torch.ones(1, 16, 1).double()).nearest(problem.w) * keep
    assert error(problem, given) < 0.8 * error(problem, nearest)


def test_scales_of_the_rows_are_fitted_and_the_table_is_of_integers():
    w, h = layer(4, 12, 40)
    w = w * torch.logspace(-2, 1, 12)[:, None]
    problem = Problem.of(w, h)

    def settle(entries: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unit = entries.abs().max() / 127
        return (entries / unit).round(), scale * unit

    start = torch.linspace(-2, 2, 8)
    sizes = w.square().mean(2, keepdim=True).sqrt()
    entries, scale, codes, given = fit_table(problem, start, sizes, scaled=True, settle=settle)
    assert torch.equal(entries, entries.round())
    assert int(entries.abs().max()) == 127
    assert torch.equal(given, entries[codes] * scale)
    one = fit_table(problem, torch.quantile(w.flatten(), torch.linspace(0.02, 0.98, 8)), torch.ones(1, 12, 1))[3]
    assert float((errors(problem.w, given, problem.h) / errors(problem.w, 0 * problem.w, problem.h)).mean()) < 0.05
    assert float((errors(problem.w, one, problem.h) / errors(problem.w, 0 * problem.w, problem.h)).mean()) > 0.2


def test_what_stays_under_a_mask_is_the_least_squares_fit():
    problem = Problem.of(*layer(5, 6, 20))
    keep = torch.rand(problem.w.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    given, _ = fix_zeros(Problem(w=problem.w, h=problem.h, keep=keep))
    assert not bool(given[~keep].any())
    h = problem.h[0]
    for row in range(6):
        s = keep[0, row]
        exact = torch.linalg.solve(h[s][:, s], h[s] @ problem.w[0, row])
        torch.testing.assert_close(given[0, row, s], exact, rtol=1e-3, atol=1e-3)


def test_zeros_that_the_solver_chooses_cost_less_than_the_smallest_and_those_of_before_stay():
    problem = Problem.of(*layer(6, 8, 32))
    gone = torch.zeros_like(problem.w, dtype=torch.bool)
    gone[:, :, 0] = True
    count = problem.w.numel() // 2

    def choose(scores: torch.Tensor, share: float) -> torch.Tensor:
        left = scores.numel() - round(count * share)
        keep = torch.zeros(scores.numel(), dtype=torch.bool)
        keep[scores.flatten().topk(left)[1]] = True
        return keep.reshape(scores.shape)

    ours, keep = fix_zeros(Problem(w=problem.w, h=problem.h, keep=~gone), choose)
    assert int((~keep).sum()) == count
    assert not bool(keep[gone].any())
    smallest, _ = fix_zeros(Problem(w=problem.w, h=problem.h, keep=choose(problem.w.abs().where(~gone, -1.0), 1.0)))
    assert error(problem, ours) < error(problem, smallest)


def test_dead_inputs_and_fewer_samples_than_inputs_are_damped_and_nan_is_refused():
    w, h = layer(7, 4, 40, samples=6)
    h[:, 0], h[:, :, 0] = 0, 0
    problem = Problem.of(w, h)
    values = values_of(problem, "grid")
    assert bool(torch.isfinite(round_to(problem, values)).all())
    assert error(problem, round_to(problem, values)) <= error(problem, values.nearest(problem.w))
    with pytest.raises(ModelError, match="NaN or infinity"):
        round_to(Problem.of(w, h * torch.nan), values)


def test_weights_aim_at_what_the_layer_gave_before():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    seen = x * 0.8 + 0.1 * torch.randn(400, 6, generator=generator)
    w = torch.randn(1, 3, 6, generator=generator)
    new = aimed(w, damped((seen.T @ seen / 400)[None]), (x.T @ seen / 400)[None]).float()
    before, after = ((x @ w[0].T - seen @ v[0].T).square().mean() for v in (w, new))
    assert float(after) < 0.5 * float(before)


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (2, 4, 7, 7)),
        (lambda: nn.Conv1d(3, 6, 3, padding=1, padding_mode="reflect", dilation=2), (2, 3, 9)),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
        (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5)),
        (lambda: nn.Linear(5, 3), (2, 3, 5)),
        (lambda: nn.Linear(5, 3), (5,)),
    ],
)
def test_moments_tell_what_a_change_of_weights_does_to_the_outputs(made, shape):
    torch.manual_seed(0)
    module, x = made(), torch.randn(shape)
    change = torch.randn_like(module.weight)
    rows = as_rows(module, change)
    assert torch.equal(from_rows(module, rows, change.shape), change)
    told = float(((rows @ moments(module, [x])) * rows).sum())
    with torch.no_grad():
        before = module(x)
        module.weight += change
        given = (module(x) - before).square().sum()
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    places = before.numel() / channels
    if isinstance(module, nn.ConvTranspose2d):
        places = places / 4  # each place that is read gives four
    torch.testing.assert_close(told, float(given / places), rtol=1e-4, atol=1e-5)
