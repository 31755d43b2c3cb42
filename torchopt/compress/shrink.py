"""Structured pruning to a goal: a ratio of channels, a number of multiply-adds, or a latency measured in ONNX Runtime here.

The engine (`prune/channels`) removes a given ratio; a goal is met by bisection over the ratio. Latency is not proportional to
multiply-adds: ORT's float convolutions work in blocks of 16 channels, so a latency goal rounds widths to 16, measures each candidate
against the dense network burst by burst, and keeps the one nearest below the goal.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from torchopt.channels import Arguments, Channels, Examples, count_macs
from torchopt.errors import ConfigError, ModelError, TargetError
from torchopt.export import export
from torchopt.process.ordinary import alone
from torchopt.process.random_state import random_state_kept
from torchopt.runtime import benchmark
from torchopt.runtime.benchmark import Row

STEPS = 7  # bisections: the ratio is known to 1/128
WITHIN = 0.05  # a latency within 5 % below the goal is good enough
HIGHEST = 0.95
REPEATS = 15  # bursts of each network; doubled while it is not clear on which side of the goal a candidate lies
MOST_REPEATS = 120


@alone()
@random_state_kept()
def shrink(
    model: nn.Module,
    example_inputs: Examples,
    *,
    ratio: float | Mapping[str, float] | None = None,
    max_macs: int | None = None,
    max_latency_ms: float | None = None,
    masked: bool = False,
    importance: str = "magnitude",
    round_to: int | None = None,
    ignore: Sequence[str] = (),
    global_ranking: bool = False,
    isomorphic: bool = False,
    threads: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` with fewer channels, to exactly one of four goals.

    Args:
        model: the network; it is not touched. For importance "taylor", run backward on it first: its `.grad` are read, and weights
            without one (frozen layers) have no say.
        example_inputs: the positional arguments of one forward call, or a dict of arguments by name; their shapes are what latency and
            multiply-adds are for.
        ratio: fraction of each width to remove, in (0, 1); or fractions by layer, `{"layer3.*": 0.5, "*": 0.25}`: globs over layer
            names, of which the first that matches decides. Layers that no glob matches keep their channels; layers that share their
            channels shrink by the smallest fraction given for any of them.
        max_macs: multiply-adds of one forward call to stay below.
        max_latency_ms: milliseconds of one call in ONNX Runtime, float, on this machine, to stay below.
        masked: remove exactly the channels that `Prune(pattern="channel", scope="coupled")` has masked; what the network computes stays.
        importance: how channels are ranked: "magnitude", "taylor", "lamp", "fpgm", "bn_scale" or "random".
        round_to: widths stay multiples of this; 8, or 16 for a latency goal.
        ignore: globs of modules whose output channels all stay.
        global_ranking: rank the channels of all widths together, so that some shrink more than others.
        isomorphic: rank together only widths whose layers depend on one another in the same way (arXiv:2407.04616).
        threads: for the latency measurements.
        seed: of importance "random".

    Returns:
        The smaller network. `torchopt.report` of it names the old and new widths and multiply-adds, and what stayed whole.

    Raises:
        ConfigError: no goal, several goals, or one out of its range.
        TargetError: the goal cannot be reached; the best found is named.
        RuleError: a glob in `ignore` or `ratio` matches nothing.
        DataError: the network does not take the example inputs, or its outputs on them are all zero or NaN.
        StateError: the network is prepared for training, or "taylor" finds no gradients.
        ModelError: no channel can be removed; the first layer that keeps its channels, and why, is named. Or the model is wrapped for
            training in parallel.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> shrink(net, (torch.zeros(1, 3, 8, 8),), ratio=0.5)[0].out_channels
        16
    """
    _check(ratio, max_macs, max_latency_ms, round_to, masked)
    if isinstance(ratio, Mapping) and (global_ranking or isomorphic):
        raise ConfigError(
            "shrink: ratio by layer with global_ranking or isomorphic, which rank layers together; give one or the other"
        )
    channels = Channels(model, example_inputs, importance=importance, ignore=ignore, seed=seed)
    multiple = round_to if round_to is not None else 16 if max_latency_ms is not None else 8

    cut = partial(channels.without, round_to=multiple, global_ranking=global_ranking, isomorphic=isomorphic)
    if masked:
        return channels.masked()
    if ratio is not None:
        return _to_ratio(channels, cut, ratio, multiple)
    if max_macs is not None:
        return _to_macs(cut, channels.inputs, max_macs)
    assert max_latency_ms is not None
    return _to_latency(model, channels, cut, max_latency_ms, threads)


def _check(
    ratio: float | Mapping[str, float] | None,
    max_macs: int | None,
    max_latency_ms: float | None,
    round_to: int | None,
    masked: bool,
) -> None:
    goals = {"max_macs": max_macs, "max_latency_ms": max_latency_ms}
    given = [name for name, value in {"ratio": ratio, **goals, "masked": masked or None}.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"shrink: got {given or 'no goal'}; give exactly one of ratio, max_macs, max_latency_ms and masked")
    if isinstance(ratio, Mapping):
        if not ratio:
            raise ConfigError("shrink: ratio={}; at least one glob with its fraction is needed, such as {'layer3.*': 0.5}")
        for glob, fraction in ratio.items():
            if not 0 <= fraction < 1:
                raise ConfigError(f"shrink: ratio[{glob!r}]={fraction}; a fraction of channels in [0, 1) is needed")
    elif ratio is not None and not 0 < ratio < 1:
        raise ConfigError(f"shrink: ratio={ratio}; a fraction of channels in (0, 1) is needed")
    if round_to is not None and round_to < 1:
        raise ConfigError(f"shrink: round_to={round_to}; a whole number of at least 1 is needed")
    for name, value in goals.items():
        if value is not None and value <= 0:
            raise ConfigError(f"shrink: {name}={value}; a number above 0 is needed")


def _to_ratio(channels: Channels, cut: Callable[..., nn.Module], ratio: float | Mapping[str, float], multiple: int) -> nn.Module:
    small = cut(0.0, ratios=channels.by_layer(ratio)) if isinstance(ratio, Mapping) else cut(ratio)
    if sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in channels.model.parameters()):
        widths = ", ".join(f"{group.layers[0]}: {len(group) * group.unit}" for group in channels.groups[:5])
        raise ModelError(
            f"shrink: ratio={ratio} with round_to={multiple} removes nothing ({widths}); a smaller round_to is needed"
        )
    return small


def _to_macs(cut: Callable[[float], nn.Module], inputs: Arguments, goal: int) -> nn.Module:
    smallest = cut(HIGHEST)
    least = count_macs(smallest, inputs)[0]
    if least > goal:
        raise TargetError(f"shrink: max_macs={goal:,} cannot be reached; the fewest found is {least:,}")
    low, high, best = 0.0, HIGHEST, smallest
    for _ in range(STEPS):
        middle = (low + high) / 2
        candidate = cut(middle)
        if count_macs(candidate, inputs)[0] <= goal:
            high, best = middle, candidate
        else:
            low = middle
    return best


def _to_latency(model: nn.Module, channels: Channels, cut: Callable[..., nn.Module], goal: float, threads: int) -> nn.Module:
    inputs = (*channels.inputs.args, *channels.inputs.kwargs.values())
    positional = partial(_ByPosition, count=len(channels.inputs.args), names=tuple(channels.inputs.kwargs))
    with tempfile.TemporaryDirectory() as folder:
        dense, path = Path(folder) / "dense.onnx", Path(folder) / "candidate.onnx"
        export(positional(model), inputs, dense, pack=False)
        alone = [benchmark([dense], threads=threads, repeats=REPEATS, progress=False).rows[0].latency_ms for _ in range(3)]
        stand = statistics.median(alone)
        if stand <= goal:
            return cut(0.0)

        def latency(candidate: nn.Module) -> float:
            export(positional(candidate), inputs, path, pack=False)
            return stand * _settled_ratio(
                lambda repeats: benchmark([dense, path], threads=threads, repeats=repeats, progress=False).rows[1], goal / stand
            )

        return _bisect(cut, latency, goal, [group.layers[0] for group in channels.groups])


class _ByPosition(nn.Module):
    """A network whose arguments by name follow those by position, as an exported file has them."""

    def __init__(self, network: nn.Module, count: int, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.count, self.names = network, count, tuple(names)

    def forward(self, *inputs: Any) -> Any:
        """Call the network."""
        return self.network(*inputs[: self.count], **dict(zip(self.names, inputs[self.count :], strict=True)))


def _settled_ratio(measure: Callable[[int], Row], goal: float) -> float:
    """The latency of a candidate relative to the dense network, burst by burst, so that drift of the machine cancels.

    It is measured longer until it lies on one side of the goal by two standard errors: of many candidates measured once, the one
    that seems best would be the one whose measurement erred most. A median of n values errs by 0.93 · (quartile distance) / √n.
    """
    repeats = REPEATS
    while True:
        row = measure(repeats)
        error = 0.93 * (row.ratio_high - row.ratio_low) / math.sqrt(repeats)
        if abs(row.ratio - goal) > 2 * error or repeats >= MOST_REPEATS:
            return row.ratio
        repeats *= 2


def _bisect(
    cut: Callable[..., nn.Module], latency: Callable[[nn.Module], float], goal: float, names: Sequence[str] = ()
) -> nn.Module:
    """The slowest candidate that meets the goal; the search ends early within 2.5 % of it.

    Rounded to 16, all layers of one width change at the same ratio: a step of latency larger than 5 %. So the last steps lie within
    it: the first k of the layers `names` at the ratio that is too slow, the others at the one that is fast enough.
    """
    smallest = cut(HIGHEST)
    best = (latency(smallest), smallest)
    if best[0] > goal:
        raise TargetError(f"shrink: max_latency_ms={goal:.4g} cannot be reached; the fastest found takes {best[0]:.4g} ms")
    low, high = 0.0, HIGHEST
    for _ in range(STEPS):
        if best[0] >= goal * (1 - WITHIN / 2):
            return best[1]
        middle = (low + high) / 2
        candidate = cut(middle)
        took = latency(candidate)
        low, high = (middle, high) if took > goal else (low, middle)
        best = max(best, (took, candidate), key=lambda pair: pair[0] if pair[0] <= goal else 0.0)
    few, many = 0, len(names)
    while many - few > 1 and best[0] < goal * (1 - WITHIN / 2):
        middle_count = (few + many) // 2
        candidate = cut(high, ratios=dict.fromkeys(names[:middle_count], low))
        took = latency(candidate)
        few, many = (few, middle_count) if took > goal else (middle_count, many)
        best = max(best, (took, candidate), key=lambda pair: pair[0] if pair[0] <= goal else 0.0)
    return best[1]
