"""Streaming histograms and the ranges chosen from them, against closed forms and numpy."""

import numpy as np
import pytest
import torch

from torchopt.quantize.observers.histogram import BINS, PIECE, StreamingHistogram
from torchopt.quantize.observers.ranges import entropy_range, minmax_range, mse_range, percentile_range, quantized


def seen(*batches: torch.Tensor) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for batch in batches:
        histogram.observe(batch)
    return histogram


def test_counts_equal_numpy():
    x = torch.linspace(-3, 5, 10_001)
    histogram = seen(x)
    width, first = 2.0 ** int(histogram.exponent), int(histogram.first)
    edges = (np.arange(BINS + 1) + first) * width
    np.testing.assert_allclose(histogram.counts.numpy(), np.histogram(x.numpy(), edges)[0], atol=1)  # float32 edges


@pytest.mark.parametrize("weighed", [False, True])
def test_pieces_of_a_large_tensor_are_one_tensor(weighed):
    x = torch.linspace(-3, 5, 2 * PIECE + 7)
    weights = torch.full_like(x, 0.5) if weighed else None
    whole, parts = StreamingHistogram(), StreamingHistogram()
    whole.observe(x, weights)
    parts.observe(x[[0, -1]], None if weights is None else weights[[0, -1]])  # the ends, so that all bins are there
    for piece in x[1:-1].split(1000):
        parts.observe(piece, None if weights is None else weights[: len(piece)])
    assert torch.equal(whole.counts, parts.counts)
    assert float(whole.counts.sum()) == len(x) * (0.5 if weighed else 1.0)


def test_order_of_batches_does_not_matter():
    torch.manual_seed(0)
    batches = [torch.randn(500) * scale for scale in (0.01, 1.0, 30.0, 0.5)]
    one, other = seen(*batches), seen(*reversed(batches))
    assert float(one.low) == float(other.low)
    assert float(one.counts.sum()) == float(other.counts.sum()) == 2000
    assert abs(int(one.exponent) - int(other.exponent)) <= 1
    np.testing.assert_allclose(percentile_range(one, 99), percentile_range(other, 99), rtol=0.05)


def test_constant_and_zero_data():
    assert minmax_range(seen(torch.zeros(10))) == (0.0, 0.0)
    assert minmax_range(seen(torch.full((10,), 2.5))) == (0.0, 2.5)
    assert mse_range(seen(torch.zeros(10))) == (0.0, 0.0)


def test_state_dict_has_fixed_shapes():
    histogram = seen(torch.randn(100) * 50)
    twin = StreamingHistogram()
    twin.load_state_dict(histogram.state_dict(), strict=True)
    torch.testing.assert_close(twin.counts, histogram.counts, rtol=0, atol=0)


def test_percentile_two_sided_and_one_sided():
    low, high = percentile_range(seen(torch.linspace(-1, 1, 100_001)), 99.0)
    assert (low, high) == pytest.approx((-0.99, 0.99), abs=2e-3)
    low, high = percentile_range(seen(torch.linspace(0, 1, 100_001)), 99.0)
    assert (low, high) == pytest.approx((0.0, 0.99), abs=2e-3)


def test_mse_keeps_uniform_data_whole_and_clips_an_outlier():
    low, high = mse_range(seen(torch.linspace(-1, 1, 4001)))
    assert (low, high) == pytest.approx((-1, 1), abs=0.02)
    torch.manual_seed(0)
    data = torch.cat([torch.randn(100_000), torch.tensor([60.0])])
    low, high = mse_range(seen(data), levels=15)
    assert high < 20
    ends = ((low, high), minmax_range(seen(data)))
    errors = [float((quantized(data, torch.tensor(a), torch.tensor(b), 15) - data).square().mean()) for a, b in ends]
    assert errors[0] < 0.5 * errors[1]


def test_mse_is_the_best_of_a_brute_force_search():
    torch.manual_seed(1)
    data = torch.relu(torch.randn(50_000)) ** 2
    histogram = seen(data)
    low, high = mse_range(histogram, levels=15)
    tried = {
        m: float((quantized(data, torch.tensor(0.0), torch.tensor(m), 15) - data).square().mean())
        for m in np.linspace(0.2, float(data.max()), 400)
    }
    chosen = float((quantized(data, torch.tensor(low), torch.tensor(high), 15) - data).square().mean())
    assert low == 0.0
    assert chosen <= 1.01 * min(tried.values())


def test_entropy_clips_a_long_tail_less_than_all():
    torch.manual_seed(2)
    data = torch.distributions.Laplace(0.0, 1.0).sample((200_000,))
    low, high = entropy_range(seen(data))
    assert -13 < low < -3
    assert 3 < high < float(data.max())
