"""Weights stay compressed in flash: codes of four bits, and runs of non-zeros; their products are the same integers."""

import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt.c_code import verify_c
from torchopt.c_code.arena import largest_pair, planned
from torchopt.c_code.machines import MACHINES
from torchopt.c_code.program import Program, Step, Value
from torchopt.c_code.weights import decoded, stored

compiles = pytest.mark.skipif(bool(MACHINES["host"].missing), reason=MACHINES["host"].missing or "compiles")


def weights(form, rows=12, taps=45, seed=0):
    chance = np.random.default_rng(seed)
    values = chance.integers(-128, 128, (rows, taps)).astype(np.int8)
    if form in ("CODES", "RUNS4"):
        values = np.array([-90, -41, -17, -8, 3, 9, 14, 33, 60, 127], np.int8)[chance.integers(0, 10, (rows, taps))]
    if form in ("RUNS", "RUNS4"):
        values[chance.random((rows, taps)) < 0.85] = 0
    return values


@pytest.mark.parametrize(("form", "size"), [("DENSE", 540), ("CODES", 12 * 23 + 16), ("RUNS", None), ("RUNS4", None)])
def test_each_form_is_chosen_where_it_is_small_and_gives_the_weights_again(form, size):
    rows = weights(form)
    found = stored(rows)
    assert found.form == form
    np.testing.assert_array_equal(decoded(found, rows.shape), rows)
    assert found.size == size or (size is None and found.size < 0.5 * rows.size)


def test_a_gap_longer_than_its_field_is_skipped_in_steps():
    rows = np.zeros((2, 1000), np.int8)
    rows[0, [0, 17, 999]], rows[1, 500] = (5, -5, 7), 7
    found = stored(rows)
    np.testing.assert_array_equal(decoded(found, rows.shape), rows)
    assert found.form == "RUNS"  # 255 zeros at a time: 3 + 3 and 1 + 1 entries of two bytes, and two counts
    assert (found.counts.tolist(), found.size) == ([6, 2], 2 * 8 + 4)


def test_a_row_of_zeros_alone_has_no_entries():
    rows = np.zeros((3, 64), np.int8)
    rows[1, 3] = 1
    found = stored(rows)
    assert found.counts.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(decoded(found, rows.shape), rows)


class Forms(nn.Module):
    """A convolution of few values, a grouped one of many zeros, linear layers of both and of neither."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, 2, groups=2), nn.Linear(16 * 9, 20)
        self.d = nn.Linear(20, 10)
        for number, (form, layer) in enumerate(zip(("CODES", "RUNS", "RUNS4", "DENSE"), self.children(), strict=True)):
            w = layer.weight.data
            integers = torch.from_numpy(weights(form, w.shape[0], w[0].numel(), number).astype(np.float32))
            integers[:, 0] = 127 if form in ("CODES", "RUNS4") else integers[:, 0]
            layer.weight.data = integers.reshape(w.shape) / 1000

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))).flatten(1))))


@compiles
def test_compressed_weights_give_the_same_integers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(9, 3, 8, 8)
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize())]
    model = torchopt.one_shot(Forms().eval(), rules, [x], example_inputs=(x[:1],))
    written = torchopt.export(model, (x[:1],), tmp_path / "net.c")
    forms = re.findall(r"\.form = (\w+)", written.path.read_text())
    assert forms == ["CODES", "RUNS", "RUNS4", "DENSE"]
    verdict = verify_c(model, written.path, [x], machines=["host", "cortex-m4"], board_samples=2)
    assert verdict.equal, str(verdict)


def chain(sizes, overlap):
    values = [Value(name=f"v{k}", shape=(size,), dtype="uint8") for k, size in enumerate(sizes)]
    steps = [
        Step(function="f", dtype="u8", what=f"{k}", inputs=[a], output=b, fields={}, overlap=overlap and {0: overlap})
        for k, (a, b) in enumerate(itertools.pairwise(values))
    ]
    return Program(inputs=values[:1], outputs=values[-1:], steps=steps), values


def test_the_arena_is_the_largest_pair_and_one_buffer_where_results_go_over_what_was_read():
    program, values = chain([100, 300, 200, 296], {})
    arena = planned(program)
    assert largest_pair(program) == 500
    assert arena.size == 504  # in steps of 8 bytes
    for step in program.steps:
        first, second = (arena.offsets[id(v)] for v in (step.inputs[0], step.output))
        assert first + step.inputs[0].size <= second or second + step.output.size <= first
    program, values = chain([320, 320, 320], 40)
    arena = planned(program)
    assert arena.size == 320 + 2 * 40
    offsets = [arena.offsets[id(v)] for v in values]
    assert offsets == [80, 40, 0]


def test_a_value_that_is_read_again_is_not_written_over():
    a, b, c = (Value(name=n, shape=(64,), dtype="uint8") for n in "abc")
    steps = [
        Step(function="f", dtype="u8", what="1", inputs=[a], output=b, fields={}, overlap={0: 0}),
        Step(function="f", dtype="u8", what="2", inputs=[b, a], output=c, fields={}, overlap={0: 0, 1: 0}),
    ]
    arena = planned(Program(inputs=[a], outputs=[c], steps=steps))
    assert abs(arena.offsets[id(a)] - arena.offsets[id(b)]) >= 64
    assert arena.size == 128
