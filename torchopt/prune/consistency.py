"""Whether masks are those of a step: what their schedules, patterns and earlier zeros allow, looked at instead of trusted.

    kept = max(round(units · (1 - s(t))), floors)        for s(t) at the last choice, or in the end

A mask is only ever chosen whole, so the number of its ones is known beforehand, and blocks and channels are all ones or all zeros.
The union of two masks (what an average of models makes of them) has more ones; a mask that was written over has any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchopt.prune.attach import in_axis, installed
from torchopt.prune.coupled import damaged_coupled
from torchopt.prune.mask import Mask
from torchopt.prune.pattern import conforms, pool
from torchopt.prune.schedule import Schedule
from torchopt.prune.update import Placed, groups, how_many


@torch.no_grad()
def damaged(model: nn.Module, step: int) -> str | None:
    """Say which mask of `model` is not one that optimizer step `step` can have, and how it is seen; None where all are right.

    Example:
        >>> from torchopt.prune import Prune, attach, update
        >>> from torchopt.network.weights import weights
        >>> layer = nn.Linear(8, 8)
        >>> _ = attach([(w, Prune(schedule=0.75)) for w in weights(layer)], preserve=True), update(layer, 1)
        >>> damaged(layer, 1)
        >>> _ = layer.weight_mask.fill_(True)
        >>> damaged(layer, 1)
        'the mask of weight keeps 64 of 64 weights, and its schedule 16'
    """
    for group in groups(installed(model)):
        complaint = next(filter(None, (_not_a_mask(module, mask) for module, mask in group)), None) or _wrong_count(group, step)
        if complaint:
            return complaint
    coupled = [(module, mask) for module, mask in installed(model) if mask.couplings]
    if not coupled:
        return None
    timing = coupled[0][1].config.timing
    last = last_choice(timing, step)
    return damaged_coupled(coupled, [timing.sparsity_at(last) if last else 0.0, timing.final])


def last_choice(timing: Schedule, step: int) -> int:
    """Return the last step up to `step` at which a schedule chooses masks, 0 where none was.

    Example:
        >>> from torchopt.prune.schedule import PolynomialDecay
        >>> [last_choice(PolynomialDecay(final_sparsity=0.5, begin_step=2, end_step=7, frequency=4), step) for step in (1, 5, 6, 900)]
        [0, 2, 6, 7]
    """
    last = step if timing.end_step == -1 else min(step, max(1, timing.end_step))
    return next((t for t in range(last, 0, -1) if timing.fires(t)), 0)


def _not_a_mask(module: nn.Module, mask: Mask) -> str | None:
    """What no choice leaves: other numbers than 0 and 1, or a pattern that is broken."""
    values, config = mask.mask(module), mask.config
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        return f"the mask of {mask.weight_name} holds {float(values[(values != 0) & (values != 1)][0]):.3g}, and a mask is 0 or 1"
    if config.pattern in ("block", "channel") and not mask.remembers(module):
        parts = pool(values.float(), config, mask.out_axis)
        broken = int(((parts != 0) & (parts != 1)).sum())
        if broken:
            return f"the mask of {mask.weight_name} keeps parts of {broken} {config.pattern}s, and each is kept or pruned whole"
    return None


def _wrong_count(group: Sequence[Placed], step: int) -> str | None:
    """Other numbers of ones than since the last choice, or in the end (one-shot pruning goes there ahead of the schedule)."""
    config, names = group[0][1].config, [mask.weight_name for _, mask in group]
    last = last_choice(config.timing, step)
    sparsities = [config.timing.sparsity_at(last) if last else 0.0, config.timing.final]
    if config.pattern == "n:m":
        (module, mask), *_ = group  # ranked alone
        fits = not last or any(_has_groups(module, mask, sparsity) for sparsity in sparsities)
        return None if fits else f"the mask of {names[0]} keeps more than {config.n} of some {config.m} neighbours"
    units = [_units(module, mask) for module, mask in group]
    counts = [parts.numel() for parts in units]
    kept = sum(int(torch.count_nonzero(parts)) for parts in units)
    allowed = [how_many(counts, config, sparsity) for sparsity in sparsities]
    if kept in allowed or (kept < max(allowed) and any(mask.remembers(module) for module, mask in group)):
        return None
    what = "weights" if config.pattern == "element" else f"{config.pattern}s"
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"the mask of {names[0]}{more} keeps {kept} of {sum(counts)} {what}, and its schedule {allowed[0]}"


def _units(module: nn.Module, mask: Mask) -> torch.Tensor:
    """What is kept or pruned as one: not 0 where a part of it is kept."""
    now = mask.mask(module)
    return now if mask.config.pattern == "element" else pool(now.float(), mask.config, mask.out_axis)


def _has_groups(module: nn.Module, mask: Mask, sparsity: float) -> bool:
    n, m = mask.config.n, mask.config.m
    assert n is not None
    assert m is not None
    return conforms(mask.mask(module), max(n, round(m * (1.0 - sparsity))), m, in_axis(mask.out_axis))
