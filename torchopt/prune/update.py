"""Choosing masks: after each optimizer step, those whose schedule fires are ranked anew, exactly, one by one or all together.

    kept = max(round(units · (1 - s(t))), 1),   rounding half to even as TensorFlow does

Ranking looks at the weights as the optimizer left them, so a masked weight that grew over the threshold comes back, except
where zeros of an earlier round are preserved. Then every mask is multiplied in, so that the weights are sparse between two
steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchopt.errors import ModelError, StateError
from torchopt.prune.attach import in_axis, installed
from torchopt.prune.config import Prune
from torchopt.prune.coupled import decide
from torchopt.prune.gathering import add_gradients, share_inputs
from torchopt.prune.mask import Mask
from torchopt.prune.pattern import largest_of_groups, pool, spread
from torchopt.prune.score import scores
from torchopt.prune.select import Scores, keep_largest

Placed = tuple[nn.Module, Mask]
EMPTIED = 1 / 20  # of its share of the weights that stay: what a tensor keeps at least, or there is a warning


@torch.no_grad()
def update(model: nn.Module, step: int) -> bool:
    """Advance the masks of `model` to optimizer step `step`, in place.

    Args:
        model: holds masks put on by `attach`, or none.
        step: how many optimizer steps were taken, 1 after the first.

    Returns:
        True where the model has masks.

    Raises:
        StateError: a score has seen no gradients or no inputs.
        ModelError: a weight is NaN or infinite.

    Example:
        >>> from torchopt.prune import attach
        >>> from torchopt.network.weights import weights
        >>> layer = nn.Linear(8, 8)
        >>> _ = attach([(w, Prune(schedule=0.75)) for w in weights(layer)], preserve=True)
        >>> update(layer, 1), int(layer.weight_mask.sum())
        (True, 16)
    """
    placed = installed(model)
    add_gradients(placed)
    share_inputs(placed)
    firing = [(module, mask) for module, mask in placed if mask.config.timing.fires(step)]
    if any(mask.config.score == "hessian" for _, mask in firing):
        raise StateError("prune: score='hessian' is found without training, by torchopt.one_shot; train with score='magnitude'")
    for group in groups(firing):
        choose(group, group[0][1].config.timing.sparsity_at(step))
    _choose_coupled([(module, mask) for module, mask in firing if mask.couplings], step)
    _multiply(placed)
    return bool(placed)


@torch.no_grad()
def finish(model: nn.Module) -> bool:
    """Set every mask to its schedule's final sparsity now: one-shot pruning. Returns True where the model has masks.

    Raises:
        StateError: a score needs gradients or inputs and has seen none.
        ModelError: a weight is NaN or infinite.
    """
    placed = installed(model)
    share_inputs(placed)
    for group in groups(placed):
        choose(group, group[0][1].config.timing.final)
    _choose_coupled([(module, mask) for module, mask in placed if mask.couplings])
    _multiply(placed)
    return bool(placed)


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A mask whose schedule has not reached its final sparsity: the weight's name, sparsity now and in the end, and when."""

    name: str
    sparsity: float
    final: float
    done_step: int

    def __str__(self) -> str:
        return f"{self.name} has sparsity {self.sparsity:.3g}, its schedule reaches {self.final:g} at step {self.done_step}"


def unfinished(model: nn.Module, step: int) -> list[Unfinished]:
    """List the masks whose schedule would still add zeros after optimizer step `step`.

    Example:
        >>> from torchopt.prune import PolynomialDecay, attach
        >>> from torchopt.network.weights import weights
        >>> layer = nn.Linear(8, 8)
        >>> slow = Prune(schedule=PolynomialDecay(final_sparsity=0.75, end_step=10, frequency=5))
        >>> _ = attach([(w, slow) for w in weights(layer)], preserve=True), update(layer, 5)
        >>> [str(mask) for mask in unfinished(layer, 5)]
        ['weight has sparsity 0.656, its schedule reaches 0.75 at step 10']
        >>> unfinished(layer, 10)
        []
    """
    found = []
    for module, mask in installed(model):
        timing, now = mask.config.timing, mask.mask(module)
        sparsity = 1.0 - int(torch.count_nonzero(now)) / now.numel()
        if step < timing.done_step and sparsity < timing.final:
            found.append(Unfinished(name=mask.weight_name, sparsity=sparsity, final=timing.final, done_step=timing.done_step))
    return found


@torch.no_grad()
def gather(model: nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Add one sample's gradients, by weight name, to the scores that gather them, in place; for `finish` without training."""
    add_gradients(installed(model), gradients)


def observes(model: nn.Module) -> bool:
    """True where a score gathers inputs: run data through the model before `finish`."""
    return any(mask.config.score == "wanda" for _, mask in installed(model))


def choose(group: Sequence[Placed], sparsity: float) -> None:
    """Write new masks for weights that are ranked together, of one configuration, at `sparsity`."""
    config = group[0][1].config
    ranked = [_scores(module, mask) for module, mask in group]
    if config.pattern == "n:m":
        chosen = [_of_groups(entry, mask, sparsity) for entry, (_, mask) in zip(ranked, group, strict=True)]
    else:
        chosen = _ranked_units(ranked, [mask for _, mask in group], config, sparsity)
    if config.scope == "global" and sparsity >= config.timing.final:
        _warn_of_emptied(chosen, [mask.weight_name for _, mask in group], sparsity)
    _write(group, chosen)


def _write(placed: Sequence[Placed], chosen: Sequence[torch.Tensor]) -> None:
    for new, (module, mask) in zip(chosen, placed, strict=True):
        old = mask.mask(module)
        if mask.remembers(module):
            old &= new
        else:
            old.copy_(new)


def _choose_coupled(placed: Sequence[Placed], step: int | None = None) -> None:
    """New masks over coupled channels; all are chosen by one configuration."""
    if not placed:
        return
    timing = placed[0][1].config.timing
    values = {m.weight_name: _scores(module, m).values for module, m in placed if any(c.votes for c in m.couplings)}
    _write(placed, decide(placed, values, timing.final if step is None else timing.sparsity_at(step)))


def _warn_of_emptied(chosen: Sequence[torch.Tensor], names: Sequence[str], sparsity: float) -> None:
    """Ranked together, a tensor of small weights may keep next to nothing, and pass next to nothing on."""
    for mask, name in zip(chosen, names, strict=True):
        left = int(torch.count_nonzero(mask))
        if left < EMPTIED * (1.0 - sparsity) * mask.numel():
            warnings.warn(
                f"prune: scope='global' leaves {left:,} of {mask.numel():,} weights of {name}; the network may stop there: set min_keep "
                f"to a fraction such as {0.2 * (1.0 - sparsity):.2g}, or leave this layer out",
                stacklevel=2,
            )


def groups(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Those with scope "global" and equal configurations together, every other mask by itself."""
    together: dict[Prune, list[Placed]] = {}
    alone = []
    for module, mask in placed:
        if mask.couplings:
            continue  # `coupled.py` chooses these
        if mask.config.scope == "global":
            together.setdefault(mask.config, []).append((module, mask))
        else:
            alone.append([(module, mask)])
    return [*alone, *together.values()]


def _scores(module: nn.Module, mask: Mask) -> Scores:
    """Score every element; where zeros are preserved, the masked ones come last (0 where scores are pooled)."""
    weight, config = mask.weight(module), mask.config
    if not bool(torch.isfinite(weight.trainable.sum())):
        raise ModelError(
            f"{weight.name}: holds NaN or infinity after an optimizer step; training has diverged, lower the learning rate"
        )
    entry = scores(weight, config, mask.gathered(module))
    if not mask.remembers(module):
        return entry
    dead = 0.0 if config.pattern in ("block", "channel") else -math.inf
    values = entry.values.abs() if entry.absolute else entry.values
    return Scores(name=entry.name, values=torch.where(mask.mask(module), values, dead).contiguous())


def _ranked_units(ranked: Sequence[Scores], masks: Sequence[Mask], config: Prune, sparsity: float) -> list[torch.Tensor]:
    units = [_pooled(entry, config, mask.out_axis) for entry, mask in zip(ranked, masks, strict=True)]
    counts = [entry.count for entry in units]
    kept = keep_largest(units, how_many(counts, config, sparsity), floors=_floors(counts, config))
    shapes = [entry.values.shape for entry in ranked]
    return [spread(new, shape, config, mask.out_axis) for new, shape, mask in zip(kept, shapes, masks, strict=True)]


def how_many(counts: Sequence[int], config: Prune, sparsity: float) -> int:
    """Return how many units survive of tensors with so many units each, ranked together.

    Example:
        >>> how_many([100, 10], Prune(schedule=0.9, scope="global"), 0.9)
        11
    """
    keep = max(round(sum(counts) * (1.0 - sparsity)), 1)
    return min(max(keep, sum(map(min, counts, _floors(counts, config)))), sum(counts))


def _floors(counts: Sequence[int], config: Prune) -> list[int]:
    return [max(1, math.ceil(config.min_keep * count)) for count in counts]


def _pooled(entry: Scores, config: Prune, out_axis: int) -> Scores:
    if config.pattern == "element":
        return entry
    values = entry.values.abs() if entry.absolute else entry.values
    wide = values if values.dtype == torch.float64 else values.float()
    return Scores(name=entry.name, values=pool(wide, config, out_axis).contiguous())


def _of_groups(entry: Scores, mask: Mask, sparsity: float) -> torch.Tensor:
    """The n:m mask; at a lower sparsity on the way there, groups keep as many of m as that allows."""
    n, m = mask.config.n, mask.config.m
    assert n is not None
    assert m is not None
    values = entry.values.abs() if entry.absolute else entry.values
    return largest_of_groups(values, max(n, round(m * (1.0 - sparsity))), m, in_axis(mask.out_axis))


def _multiply(placed: Sequence[Placed]) -> None:
    """Mask the Parameters in place, whether their version says that they changed or not (`p.data` bypasses it)."""
    for module, mask in placed:
        mask.applied = None
        mask.multiply_(module, mask.leaf(module))
