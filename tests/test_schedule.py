"""Schedules: TFMOT's numbers (P1–P6 of its own test-suite), and its defects corrected: the final sparsity is always reached."""

import dataclasses
import math

import pytest

from torchopt.errors import ConfigError
from torchopt.prune.schedule import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay

SPANS = [
    lambda **kw: ConstantSparsity(target_sparsity=0.5, **kw),
    lambda **kw: PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, **{"end_step": 20, **kw}),
    lambda **kw: CosineDecay(initial_sparsity=0.2, final_sparsity=0.8, **{"end_step": 20, **kw}),
]


@pytest.mark.parametrize("make", SPANS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin_step": -1}, "begin_step: got -1; an optimizer step of at least 0"),
        ({"begin_step": -5}, "begin_step: got -5"),
        ({"end_step": -5}, "end_step: got -5, before begin_step=0; at least 0 is needed"),
        ({"begin_step": 10, "end_step": 5}, "end_step: got 5, before begin_step=10; at least 10 is needed"),
        ({"frequency": 0}, "frequency: got 0; at least 1 step"),
        ({"frequency": -1}, "frequency: got -1"),
        ({"frequency": -5}, "frequency: got -5"),
        ({"begin_step": 1.5}, "begin_step: got 1.5"),
        ({"end_step": "100"}, "end_step: got '100'"),
        ({"frequency": True}, "frequency: got True"),
    ],
)
def test_P1_spans_out_of_range_are_refused(make, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(**fields)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("sparsity", [-0.001, -1, -10, 1.0, 10, math.nan, "0.5", None, True])
def test_P1_sparsity_outside_zero_to_one_is_refused(sparsity):
    message = r"got .*; a fraction of zeros in \[0, 1\) is needed"
    with pytest.raises(ConfigError, match=r"ConstantSparsity\.target_sparsity: " + message):
        ConstantSparsity(target_sparsity=sparsity)
    with pytest.raises(ConfigError, match=r"PolynomialDecay\.initial_sparsity: " + message):
        PolynomialDecay(initial_sparsity=sparsity, final_sparsity=0.5, end_step=10)
    with pytest.raises(ConfigError, match=r"CosineDecay\.final_sparsity: " + message):
        CosineDecay(final_sparsity=sparsity, end_step=10)
    with pytest.raises(ConfigError, match=r"MultiStep\.sparsities: " + message):
        MultiStep(milestones=(1,), sparsities=(sparsity,))


@pytest.mark.parametrize("sparsity", [0, 0.001, 0.5, 0.99])
def test_P1_sparsity_within_is_accepted(sparsity):
    assert ConstantSparsity(target_sparsity=sparsity).final == sparsity
    assert PolynomialDecay(initial_sparsity=sparsity, final_sparsity=sparsity, end_step=10).final == sparsity


def test_P1_decay_needs_an_end():
    for make in SPANS[1:]:
        with pytest.raises(ConfigError, match=r"end_step: got -1; the optimizer step that reaches the final sparsity is needed"):
            make(end_step=-1)


@pytest.mark.parametrize("power", [0, -1, math.nan, math.inf, "3", True])
def test_P1_power_is_a_positive_number(power):
    with pytest.raises(ConfigError, match=r"PolynomialDecay\.power: got .*; a number above 0 is needed"):
        PolynomialDecay(final_sparsity=0.5, end_step=10, power=power)


@pytest.mark.parametrize(
    ("milestones", "sparsities", "message"),
    [
        ((), (), r"MultiStep\.milestones: got \(\); a list of at least one number"),
        ("12", (0.5,), r"MultiStep\.milestones: got '12'; a list"),
        ((5, 5), (0.5, 0.6), r"MultiStep\.milestones: got \[5, 5\]; each must be larger"),
        ((0,), (0.5,), r"MultiStep\.milestones: got 0; whole optimizer steps of at least 1"),
        ((5, 9), (0.5,), r"MultiStep: got 2 milestones and 1 sparsities; one sparsity a milestone"),
    ],
)
def test_multi_step_refuses_stairs_that_do_not_rise(milestones, sparsities, message):
    with pytest.raises(ConfigError, match=message):
        MultiStep(milestones=milestones, sparsities=sparsities)


@pytest.mark.parametrize("make", SPANS)
def test_P2_fires_within_begin_and_end_only(make):
    schedule = make(begin_step=100, end_step=200, frequency=1)
    assert [schedule.fires(step) for step in (90, 99, 201, 210)] == [False] * 4
    assert [schedule.fires(step) for step in (100, 110, 200)] == [True] * 3


@pytest.mark.parametrize("make", SPANS)
def test_P3_fires_each_frequency_steps(make):
    schedule = make(begin_step=100, end_step=200, frequency=10)
    assert [schedule.fires(step) for step in (100, 109, 110, 111)] == [True, False, True, False]


def test_P4_constant_without_end_goes_on_for_ever():
    schedule = ConstantSparsity(target_sparsity=0.5, begin_step=0, end_step=-1, frequency=10)
    for step in (10_000, 100_000_000):
        assert schedule.fires(step)
        assert schedule.sparsity_at(step) == 0.5


def test_P5_polynomial_decay_to_the_digit():
    schedule = PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=100, end_step=110, power=3)
    got = [schedule.sparsity_at(step) for step in (0, 100, 102, 105, 110, 1000)]
    assert got == pytest.approx([0.2, 0.2, 0.4928, 0.725, 0.8, 0.8], abs=1e-12)


@pytest.mark.parametrize("make", SPANS)
def test_P6_fields_rebuild_an_equal_schedule(make):
    schedule = make(begin_step=3, end_step=17, frequency=4)
    again = type(schedule)(**dataclasses.asdict(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    stairs = MultiStep(milestones=[2, 4], sparsities=[0.1, 0.2])
    assert MultiStep(**dataclasses.asdict(stairs)) == stairs


def test_P6_each_class_names_its_recipe_kind():
    kinds = [cls.kind for cls in (ConstantSparsity, PolynomialDecay, CosineDecay, MultiStep)]
    assert kinds == ["constant", "polynomial", "cosine", "multi_step"]
    assert "kind" not in {field.name for field in dataclasses.fields(PolynomialDecay)}


def _reached(schedule, steps):
    """The sparsity in force after training `steps` optimizer steps."""
    fired = [step for step in range(1, steps + 1) if schedule.fires(step)]
    return schedule.sparsity_at(fired[-1]) if fired else 0.0


@pytest.mark.parametrize("end", [1, 2, 7, 99, 100, 101, 250])
def test_final_sparsity_is_reached_whatever_the_frequency(end):
    """TFMOT misses it unless the span is a multiple of the frequency (its last update comes earlier)."""
    for cls in (PolynomialDecay, CosineDecay):
        schedule = cls(initial_sparsity=0.1, final_sparsity=0.8, begin_step=0, end_step=end, frequency=100)
        assert _reached(schedule, end) == 0.8
        assert _reached(schedule, end + 500) == 0.8


@pytest.mark.parametrize("begin", [0, 1, 5])
def test_begin_equal_to_end_is_the_final_sparsity_at_once(begin):
    """TFMOT divides 0 by 0 here."""
    schedule = PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.8, begin_step=begin, end_step=begin)
    assert schedule.sparsity_at(begin) == 0.8
    assert _reached(schedule, max(begin, 1)) == 0.8


def test_training_shorter_than_frequency_prunes_all_the_same():
    """TFMOT's first mask of begin_step=0, frequency=100 comes at step 100."""
    schedule = ConstantSparsity(target_sparsity=0.5)
    assert [step for step in range(1, 301) if schedule.fires(step)] == [1, 100, 200, 300]


def test_cosine_decay_is_half_a_cosine():
    schedule = CosineDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=100, end_step=200)
    expected = [0.2 + 0.6 * (1 - math.cos(math.pi * p)) / 2 for p in (0, 0.25, 0.5, 0.75, 1)]
    assert [schedule.sparsity_at(step) for step in (100, 125, 150, 175, 200)] == pytest.approx(expected, abs=1e-12)
    assert schedule.sparsity_at(150) == pytest.approx(0.5)


def test_multi_step_is_a_staircase():
    schedule = MultiStep(milestones=(10, 20), sparsities=(0.5, 0.8))
    assert [step for step in range(100) if schedule.fires(step)] == [10, 20]
    assert [schedule.sparsity_at(step) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 0.5, 0.5, 0.8, 0.8]
    assert (schedule.end_step, schedule.final) == (20, 0.8)
