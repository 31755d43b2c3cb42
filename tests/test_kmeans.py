"""One-dimensional k-means: optimal, exact on large data, the same for any order and scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from torchopt.cluster.tables.counted import counted
from torchopt.cluster.tables.kmeans import COUNTED_FROM, SINGLE_UP_TO, kmeans, lloyd, squared_error
from torchopt.cluster.tables.optimal import optimum
from torchopt.cluster.tables.points import in_order, merged, sorted_points
from torchopt.cluster.tables.seeds import start
from torchopt.errors import ConfigError, ModelError

FINITE = st.floats(-1e3, 1e3, allow_nan=False, width=32)
INITS = ("optimal", "kmeans++", "linear", "density", "random")


def quadratic(values: np.ndarray, k: int, mass: np.ndarray | None = None, pinned: bool = False) -> float:
    """The least squared error, by the textbook O(k n²) recurrence, over values sorted; the reference."""
    order = np.argsort(values)
    x, m = values[order], np.ones(len(values)) if mass is None else mass[order]
    n = len(x)
    sums = [np.concatenate(([0.0], np.cumsum(m * x**p))) for p in (0, 1, 2)]
    i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    w, s, q = (p[j] - p[i] for p in sums)
    cost = np.where(j > i, q - s**2 / np.where(w > 0, w, 1), np.where(i == j, 0.0, np.inf))
    zero_cost = np.where(j >= i, q, np.inf)
    free = np.full(n + 1, np.inf)
    free[0] = 0.0
    used = (free[:, None] + zero_cost).min(0)
    for _ in range(k - pinned):
        used = (used[:, None] + cost).min(0) if pinned else used
        free = (free[:, None] + cost).min(0)
        if pinned:
            used = np.minimum(used, (free[:, None] + zero_cost).min(0))
    return float(used[n] if pinned else free[n])


def sample(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kinds = (
        lambda: rng.standard_normal(n),
        lambda: rng.laplace(size=n),
        lambda: rng.standard_t(2, size=n),
        lambda: rng.uniform(-1, 1, n),
        lambda: np.concatenate((rng.normal(-3, 0.1, n // 2), rng.normal(2, 1.0, n - n // 2))),
    )
    return kinds[seed % 5]()


@pytest.mark.parametrize("seed", range(50))
def test_optimal_is_the_optimum_of_50_distributions(seed):
    n = (60, 200, 350, 500, 700)[seed % 7 % 5]
    k = (2, 3, 5, 8, 16)[seed // 10]
    values = sample(seed, n)
    assert squared_error(values, kmeans(values, k)) <= 1.000001 * quadratic(values, k) + 1e-12


def test_optimal_is_the_optimum_of_5000_points():
    values = sample(1, 5000)
    ours = squared_error(values, kmeans(values, 16))
    assert ours <= 1.000001 * quadratic(values, 16)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [3, 5, 8])
def test_pinned_optimum(seed, k):
    values = sample(seed, 120) + (seed % 3) * 0.3
    centres = kmeans(values, k, pin_zero=True)
    assert (centres == 0).sum() == 1
    assert len(centres) <= k
    assert squared_error(values, centres) <= 1.000001 * quadratic(values, k, pinned=True) + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_weighted_optimum(seed):
    values = sample(seed, 150)
    mass = np.random.default_rng(seed).exponential(size=150) ** 2
    centres = kmeans(values, 5, importance=mass)
    assert squared_error(values, centres, mass) <= 1.000001 * quadratic(values, 5, mass) + 1e-12


def test_never_above_scikit_learn():
    from sklearn.cluster import KMeans

    for seed in range(5):
        values = sample(seed, 3000)
        theirs = KMeans(8, n_init=10, random_state=0).fit(values[:, None]).inertia_
        assert squared_error(values, kmeans(values, 8)) <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("init", INITS)
def test_large_data_reach_the_same_as_sorted_data(init):
    """Bins and their taking apart change nothing: a fixed point of Lloyd on all the sorted values."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal(SINGLE_UP_TO + 70_001).astype(np.float32)
    centres = kmeans(values, 16, init=init, iterations=2000)
    again = lloyd(in_order(values, None), centres, pinned=False, iterations=1)
    np.testing.assert_allclose(again, centres, rtol=0, atol=1e-6)
    # 16 levels of N(0, 1): the distortion of the Lloyd-Max quantizer is 0.009497 (Max 1960, table I)
    assert squared_error(values, centres) / len(values) == pytest.approx(0.009497, rel=0.01)


@pytest.mark.parametrize("shape", ["heavy tails", "one outlier", "crowded", "masses", "pinned zeros"])
def test_large_uneven_data(shape):
    rng = np.random.default_rng(5)
    values = rng.standard_normal(SINGLE_UP_TO + 10_000).astype(np.float32)
    mass, pinned = None, False
    if shape == "heavy tails":
        values = rng.standard_t(1.5, size=len(values)).astype(np.float32)
    elif shape == "one outlier":
        values[0] = 1e5
    elif shape == "crowded":
        values = np.where(rng.random(len(values)) < 0.7, np.float32(0.25), values)
    elif shape == "masses":
        mass = rng.exponential(size=len(values))
    else:
        values[rng.random(len(values)) < 0.8] = 0.0
        pinned = True
    centres = kmeans(values, 8, importance=mass, pin_zero=pinned, iterations=2000)
    ordered = in_order(values if not pinned else values[values != 0], mass)
    points = merged(ordered, pinned=pinned)
    best = min(
        squared_error(values, lloyd(ordered, start(points, 8, init, pinned=pinned, seed=s), pinned=pinned, iterations=2000), mass)
        for init, s in (("kmeans++", 0), ("kmeans++", 1), ("kmeans++", 2), ("density", 0), ("linear", 0))
    )
    assert squared_error(values, centres, mass) <= best * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(6, 60), elements=FINITE), st.integers(2, 6), st.sampled_from(INITS), st.randoms())
def test_order_does_not_matter(values, k, init, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    np.testing.assert_array_equal(kmeans(values, k, init=init), kmeans(shuffled, k, init=init))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(6, 60), elements=FINITE), st.integers(2, 6), st.sampled_from([-8.0, 0.25, 1024.0]))
def test_scaling_scales_the_error(values, k, factor):
    error = squared_error(values, kmeans(values, k))
    scaled = squared_error(values * factor, kmeans(values * factor, k))
    np.testing.assert_allclose(scaled, error * factor**2, rtol=1e-6, atol=1e-9 * factor**2)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(6, 40), elements=FINITE), st.integers(2, 6), st.booleans())
def test_optimal_on_anything(values, k, pinned):
    k = max(k, 3)
    centres = kmeans(values, k, pin_zero=pinned)
    assert len(centres) <= k
    assert (np.diff(centres) > 0).all()
    assert not pinned or 0.0 in centres
    scale = 1 + np.abs(values).max() ** 2
    assert squared_error(values, centres) <= quadratic(values, k, pinned=pinned) + 1e-9 * scale * len(values)


@settings(max_examples=40, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=4, unique=True), st.integers(2, 5), st.sampled_from(INITS))
def test_ties_and_few_distinct_values(distinct, repeats, init):
    values = np.repeat(np.array(distinct), repeats * 2)
    centres = kmeans(values, max(2, len(distinct)), init=init)
    np.testing.assert_array_equal(centres, np.unique(values))


def test_constant_and_nearly_constant():
    np.testing.assert_array_equal(kmeans(np.full(50, 0.3), 4), [0.3])
    np.testing.assert_array_equal(kmeans(np.zeros(50), 4, pin_zero=True), [0.0])
    near = 1.0 + np.arange(100) * 2.0**-40
    centres = kmeans(near, 4)
    np.testing.assert_allclose((centres - 1.0) * 2.0**40, [12, 37, 62, 87], atol=0.01)
    flat = np.full(SINGLE_UP_TO + 1, 0.5, np.float32)
    np.testing.assert_array_equal(kmeans(flat, 16), [0.5])


def test_tiny_range_of_large_data():
    values = np.float32(1e-38) * np.random.default_rng(0).random(SINGLE_UP_TO + 1).astype(np.float32)
    assert len(kmeans(values, 16)) == 16


def test_an_empty_cluster_takes_half_of_the_costliest():
    values = in_order(np.array([0.0, 0.1, 5.0, 9.0]), None)
    np.testing.assert_allclose(lloyd(values, np.array([-5.0, 0.05, 100.0]), pinned=False, iterations=50), [0.05, 5.0, 9.0])


def test_optimum_leaves_no_cluster_empty():
    values = np.random.default_rng(0).standard_normal(64)
    for k in (2, 4, 16, 63):
        centres = optimum(sorted_points(values, None, pinned=False), k, pinned=False)
        assert len(centres) == k
        assert (np.diff(centres) > 0).all()


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_seed_decides(init):
    values = sample(0, 500)
    one, same, other = (kmeans(values, 8, init=init, seed=s, iterations=0) for s in (4, 4, 5))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_C4_linear_starts():
    linear = lambda values, k, zero=False: kmeans(np.array(values, float), k, init="linear", pin_zero=zero, iterations=0)
    np.testing.assert_allclose(linear(range(11), 5), [0, 2.5, 5, 7.5, 10])
    np.testing.assert_allclose(linear([-3, -1, 0, 1, 2, 5, 9], 6), [-3, -0.6, 1.8, 4.2, 6.6, 9])
    np.testing.assert_allclose(linear(range(11), 5, True), [0, 1, 4, 7, 10])
    np.testing.assert_allclose(linear([-3, 0, 1.1, 2, 4, 6, 9], 6, True), [-3, 0, 1.1, 3.733333, 6.366667, 9], rtol=1e-6)


def test_C5_density_start_interpolates_the_distribution():
    """Corrected: TFMOT's interpolation is a no-op; here the cumulative distribution really is linear between the points."""
    values = np.array([0, 1, 2, 3, 3.1, 3.2, 3.3, 3.4, 3.5])
    # mid-rank distribution: value number r (from 0) is at (r + 1/2) / 9; the entries are at 1/6, 1/2, 5/6, so r = 1, 4, 7
    np.testing.assert_allclose(kmeans(values, 3, init="density", iterations=0), [1.0, 3.1, 3.4])
    np.testing.assert_allclose(kmeans(values, 2, init="density", iterations=0), [1.75, 3.325])  # r = 1.75 and 6.25
    np.testing.assert_array_equal(kmeans(np.zeros(9), 3, init="density"), [0.0])


def test_C6_plus_plus_starts_on_the_data():
    values = sample(2, 400)
    centres = kmeans(values, 10, init="kmeans++", iterations=0)
    assert len(np.unique(centres)) == 10
    assert np.isin(centres, values).all()


@pytest.mark.parametrize("init", INITS)
def test_C7_zero_is_among_the_centres(init):
    values = sample(0, 300)
    for iterations in (0, 50):
        centres = kmeans(values, 6, init=init, pin_zero=True, iterations=iterations)
        assert (centres == 0).sum() == 1
        assert len(centres) == 6


BAD = (
    ({"n_clusters": "13"}, ConfigError, r"n_clusters: got '13'; a whole number from 2 to 256 is needed"),
    ({"n_clusters": 13.4}, ConfigError, r"n_clusters: got 13\.4; a whole number from 2 to 256"),
    ({"n_clusters": 0}, ConfigError, r"n_clusters: got 0;"),
    ({"n_clusters": 1}, ConfigError, r"n_clusters: got 1;"),
    ({"n_clusters": -32}, ConfigError, r"n_clusters: got -32;"),
    ({"n_clusters": 257}, ConfigError, r"n_clusters: got 257; a whole number from 2 to 256"),
    ({"n_clusters": True}, ConfigError, r"n_clusters: got True;"),
    ({"n_clusters": 101}, ConfigError, r"n_clusters=101 but there are only 100 values; use at most that many"),
    ({"init": "kmeans"}, ConfigError, r"init: got 'kmeans'; one of 'optimal'.* is needed; did you mean 'kmeans\+\+'"),
    ({"n_clusters": 2, "pin_zero": True}, ConfigError, r"n_clusters=2 with zero pinned leaves one other value.*use 3 or more"),
    ({"importance": np.ones(99)}, ModelError, r"importance has 99 entries for 100 values"),
    ({"importance": -np.ones(100)}, ModelError, r"one number of at least 0 a value is needed"),
    ({"importance": np.zeros(100)}, ModelError, r"all are zero"),
)


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        kmeans(**{"values": sample(0, 100), "n_clusters": 4, **change})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(bad):
    values = sample(0, 100)
    values[7] = bad
    with pytest.raises(ModelError, match=r"kmeans: 1 of 100 values are NaN or infinite; finite values are needed"):
        kmeans(values, 4)


def test_zero_importance_takes_a_value_out():
    values = np.array([0.0, 1.0, 100.0, 2.0])
    np.testing.assert_array_equal(kmeans(values, 3, importance=np.array([1.0, 1.0, 0.0, 1.0])), [0.0, 1.0, 2.0])


def test_threads_do_not_matter():
    values = np.random.default_rng(0).standard_normal(SINGLE_UP_TO + 5).astype(np.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kmeans(values, 16)
        torch.set_num_threads(2)
        np.testing.assert_array_equal(kmeans(values, 16), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("masses", [False, True])
def test_values_counted_in_cells_settle_where_sorted_ones_do(masses):
    rng = np.random.default_rng(9)
    values = rng.laplace(size=COUNTED_FROM + 30_001).astype(np.float32)
    mass = rng.exponential(size=len(values)) if masses else None
    many = counted(values, mass, 16)
    assert many is not None
    np.testing.assert_allclose(
        [many.mass.sum(), many.first.sum()],
        [mass.sum() if masses else len(values), np.dot(values.astype(np.float64), mass if masses else np.ones(len(values)))],
        rtol=1e-9,
        atol=1e-4,
    )
    centres = kmeans(values, 16, importance=mass, iterations=3000)
    again = lloyd(in_order(values, mass), centres, pinned=False, iterations=3000)
    np.testing.assert_allclose(again, centres, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).standard_normal(200_000),  # float64
        np.append(np.random.default_rng(0).standard_normal(200_000), 1e6).astype(
            np.float32
        ),  # an outlier: all others in one cell
        np.random.default_rng(0).integers(0, 200, 200_000).astype(np.float32),  # few distinct ones
    ],
    ids=["float64", "outlier", "few"],
)
def test_values_that_cells_do_not_resolve_are_sorted(values):
    assert counted(values, None, 16) is None
    assert len(kmeans(values, 16)) == 16
