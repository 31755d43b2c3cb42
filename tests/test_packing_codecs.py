"""Codecs round-trip bit for bit, and come close to the entropy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchopt.codecs import decode, encode, from_gaps, from_parts, gaps, to_parts


@given(hnp.arrays(np.uint8, st.integers(1, 300)), st.integers(1, 7))
def test_parts_round_trip(symbols, bits):
    symbols = symbols & (2**bits - 1)
    np.testing.assert_array_equal(from_parts(to_parts(symbols, bits), len(symbols)), symbols)


@given(st.lists(st.booleans(), min_size=1, max_size=500), st.integers(2, 8))
def test_gaps_round_trip(flags, bits):
    symbols = gaps(np.array(flags, np.uint8) * 6, bits, 4)
    assert symbols.max(initial=0) <= 2**bits - 1
    np.testing.assert_array_equal(from_gaps(symbols, bits, len(flags)), flags)


def sparse(count: int, sparsity: float, values: int, dtype, seed: int = 0) -> np.ndarray:
    """`values` distinct values, zero among them where sparsity > 0, all nonzeros equally likely: the hardest case for codes."""
    rng = np.random.default_rng(seed)
    others = values - (sparsity > 0)
    pool = rng.permutation(np.r_[-128:0, 1:128])[:others] if dtype == np.int8 else rng.standard_normal(others)
    w = rng.choice(pool, size=count).astype(dtype)
    w[rng.random(count) < sparsity] = 0
    return w


@pytest.mark.parametrize("dtype", [np.float32, np.int8], ids=["float", "int8"])
@pytest.mark.parametrize("values", [2, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_within_1_2_of_the_entropy(sparsity, values, dtype):
    w = sparse(65_536, sparsity, values, dtype)
    bits, counts = np.unique(w, return_counts=True)
    share = counts / counts.sum()
    bound = w.size * -(share * np.log2(share)).sum() / 8 + len(bits) * w.itemsize
    encoding = encode(w)
    size = w.nbytes if encoding is None else encoding.payload_bytes
    assert size <= 1.20 * bound
    if encoding is not None:
        np.testing.assert_array_equal(decode(encoding).view(np.uint8), w.view(np.uint8))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int32]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=12),
        elements=st.sampled_from([0, 1, 2, 3]),
    )
)
def test_any_small_tensor_round_trips(w):
    encoding = encode(np.tile(w, (16, *[1] * (w.ndim - 1))))
    if encoding is not None:
        np.testing.assert_array_equal(decode(encoding), np.tile(w, (16, *[1] * (w.ndim - 1))))


def test_nan_payloads_and_minus_zero_survive():
    bits = np.array([0x7FC00001, 0x7FC00002, 0x80000000, 0x00000000, 0x3F800000], np.uint32)
    w = np.tile(bits, 1000).view(np.float32)
    encoding = encode(w)
    assert encoding is not None
    np.testing.assert_array_equal(decode(encoding).view(np.uint32), w.view(np.uint32))


def test_tables_per_channel():
    rng = np.random.default_rng(1)
    w = rng.integers(0, 4, (32, 400)).astype(np.float32) * rng.random((32, 1)).astype(np.float32) + 1
    encoding = encode(w)
    assert encoding is not None
    assert encoding.name == "channel2"
    assert encoding.payload_bytes == 32 * 400 * 2 // 8 + 32 * 4 * 4
    np.testing.assert_array_equal(decode(encoding), w)


def test_random_weights_stay_dense():
    assert encode(np.random.default_rng(2).standard_normal(10_000).astype(np.float32)) is None


def test_sparse_random_weights_keep_their_values_raw():
    w = np.random.default_rng(3).standard_normal(10_000).astype(np.float32)
    w[np.random.default_rng(4).random(10_000) < 0.5] = 0
    encoding = encode(w)
    assert encoding is not None
    assert encoding.name == "mask+raw"
    assert encoding.payload_bytes == math.ceil(10_000 / 8) + 4 * int((w != 0).sum()) + 4


@pytest.mark.parametrize(("rows", "group", "tables"), [(64, 16, 4), (48, 16, 3), (50, 10, 5), (63, 9, 7), (64, 1, 64)])
def test_neighbouring_channels_share_a_table_where_the_codes_get_no_wider(rows, group, tables):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((rows // group, 16))
    w = np.stack([rng.choice(base[row // group], 300) for row in range(rows)]).astype(np.float32)
    encoding = encode(w)
    assert encoding is not None
    assert (encoding.name, encoding.table.shape) == ("channel4", (tables, 16))
    np.testing.assert_array_equal(decode(encoding), w)
