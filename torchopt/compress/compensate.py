"""Masks and tables without training: what they take from a layer's outputs, the weights that are left give back.

For each layer in the order of the calls, from the moments of what the network with its earlier layers changed already gives it
(`in_step.py`), the solver finds the best weights under the mask, and the table and its codes. Zeros of earlier rounds are kept, and so
are tables that an earlier round left. Under 8-bit scales a table holds integers, and each channel has a scale of its own:

    ŵ = s_channel · T[c]        K integers a tensor
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.cluster import SharedWeights
from torchopt.cluster.straight import on_grid
from torchopt.compress.in_step import Call, in_step
from torchopt.compress.seen import Seen
from torchopt.errors import ModelError
from torchopt.io.progress import track
from torchopt.network.weights import Weight, weights
from torchopt.solver import Problem, aimed, fit_table, fix_zeros, round_to
from torchopt.solver.positions import as_rows, from_rows, readable
from torchopt.solver.sweep import DAMPING
from torchopt.solver.values import Table

MASKED = 0.1  # damping under a mask: half of the weights carry the others, and must not follow what few samples show by chance


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """One weight under a mask, a table or both.

    Attributes:
        weight: which.
        original: what it was before masks were chosen.
        mask: False where it is 0; None without a mask.
        first: the mask before any was chosen: what earlier rounds left; None where the choice stands.
        shared: its table, or None.
    """

    weight: Weight
    original: Tensor
    mask: Tensor | None
    first: Tensor | None
    shared: SharedWeights | None


def held_weights(model: nn.Module, weighed: Collection[str] = ()) -> list[Held]:
    """List the weights of a prepared model that masks and tables stand on, and that the solver can learn about.

    Args:
        model: prepared, before its masks are chosen.
        weighed: names of those whose tables weigh weights otherwise (importance="fisher"), which are left out.
    """
    by_weight = {weight.name: shared for weight, shared in clustering.shared_weights(model)}
    found = []
    for weight in weights(model):
        if weight.name in weighed:
            continue
        mask, shared = pruning.mask_of(weight), by_weight.get(weight.name)
        if (mask is None and shared is None) or not readable(weight.module) or weight.param != "weight" or weight.twins:
            continue
        original = weight.trainable.detach().clone()
        first = mask.clone() if mask is not None and pruning.chooses(weight) else None
        found.append(Held(weight=weight, original=original, mask=mask, first=first, shared=shared))
    return found


@torch.no_grad()
def compensate(
    model: nn.Module, held: Sequence[Held], calls: Sequence[Call], *, origin: nn.Module | None = None, progress: bool = True
) -> None:
    """Give back, layer by layer, what masks and tables take, in place.

    Args:
        model: prepared, its masks chosen.
        held: what `held_weights` found before they were.
        calls: the samples.
        origin: the float network; given one, each layer aims at what it gives there, and so repairs what those before it did.
        progress: show a progress bar on stderr.

    Raises:
        ModelError: what a layer reads is not finite.
    """
    by_layer = {one.weight.module: one for one in held}
    training = model.training
    model.eval()
    try:
        with quantization.unrounded_all(model):
            floats = _beside(origin, held, calls)
            for layer, inputs in track(in_step(model, list(by_layer), calls), "compensate", enabled=progress):
                one = by_layer[layer]
                try:
                    _learn(one, Seen.of(layer, inputs, floats(one.weight.module_name)))
                except ModelError as error:
                    raise ModelError(f"one_shot: {one.weight.name}: {error}") from None
    finally:
        model.train(training)
    quantization.decide_scales(model)


@torch.no_grad()
def compensate_one(model: nn.Module, one: Held, seen: Seen) -> None:
    """Give back, in place, what a mask and a table take from one layer, from what it reads in the float network."""
    with quantization.unrounded_all(model):
        _learn(one, seen)
    quantization.decide_scales(model)


def _beside(origin: nn.Module | None, held: Sequence[Held], calls: Sequence[Call]) -> Callable[[str], list[Tensor] | None]:
    """Return what gives each layer's inputs in the float network, in the order of its calls; None for one that is not there."""
    modules = {} if origin is None else dict(origin.named_modules())
    there = {modules[one.weight.module_name]: one.weight.module_name for one in held if one.weight.module_name in modules}
    if origin is None or not there:
        return lambda _: None
    origin.eval()
    walk, ahead = in_step(origin, list(there), calls), dict[str, list[Tensor]]()

    def inputs(name: str) -> list[Tensor] | None:
        while name in there.values() and name not in ahead:
            found = next(walk, None)
            if found is None:
                return None
            ahead[there[found[0]]] = found[1]
        return ahead.pop(name, None)

    return inputs


def _learn(one: Held, seen: Seen) -> None:
    """Find the weights of one layer, and what the mean of each channel lacks then; write both into it."""
    layer, mean, wanted = one.weight.module, seen.mean, seen.wanted
    if mean is None or wanted is None or not quantization.add_to_mean(layer):
        _solve(one, seen.h, seen.cross)
        return
    original = one.original  # what is left to the weights is what varies
    signs = _solve(one, seen.h - mean[:, :, None] * mean[:, None], seen.cross - wanted[:, :, None] * mean[:, None])
    original = original if signs is None else original * _along(signs, original, 0)
    sums = (as_rows(layer, w.float()) @ m[:, :, None] for w, m in ((original, wanted), (one.weight.value, mean)))
    before_that, now = (x.reshape(-1) for x in sums)
    quantization.add_to_mean(layer, before_that - now)


def _solve(one: Held, h: Tensor, cross: Tensor) -> Tensor | None:
    """Find the weights of one layer, and write them into it; return the signs by which its channels were turned."""
    layer, w = one.weight.module, one.original
    integers = _integers(one)
    signs = quantization.turn_channels(layer) if integers else None
    if signs is not None:
        w = w * _along(signs, w, one.weight.out_axis)
    factor = _along(quantization.channel_factors(layer, w.shape[one.weight.out_axis]).to(w), w, one.weight.out_axis)
    wide = as_rows(layer, factor.expand(w.shape).contiguous())  # what a row's error counts at the output
    known = one.mask if one.first is None else one.first
    keep = None if known is None else as_rows(layer, known).contiguous()
    aim = as_rows(layer, w * factor).contiguous()
    damping = DAMPING if one.mask is None else MASKED
    problem = Problem.of(aim, h, keep, damping)
    problem = replace(problem, w=aimed(problem.w, problem.h, cross.to(problem.h.dtype), damping))
    free = problem.w
    if one.mask is not None:
        free, keep = fix_zeros(problem, _chooser(one) if one.first is not None else None)
        one.mask.copy_(from_rows(layer, keep, w.shape))
        problem = replace(problem, keep=keep)
    if one.shared is None:
        assert keep is not None
        one.weight.trainable.copy_(from_rows(layer, (free / wide * keep).to(w.dtype), w.shape) + 0.0)
    elif len(one.shared.codes) > 1:
        _onto_tables(one, problem, wide.to(problem.w.dtype))
    else:
        _share(one, problem, wide[:, :, :1].to(problem.w.dtype), free, integers)
    return signs


def _integers(one: Held) -> int:
    """The largest integer of a table under scales of the channels; 0 where the table is of floats, or is kept, or its rows are taps."""
    shared, layer = one.shared, one.weight.module
    if shared is None or len(shared.codes) > 1 or shared.config.table_bits is not None or _is_kept(one) or one.weight.out_axis:
        return 0
    return quantization.scales_channels(layer)


def _is_kept(one: Held) -> bool:
    """True for a table of the few values that an earlier round left."""
    assert one.shared is not None
    values = one.original[one.original != 0]
    most = one.shared.table.shape[1] - one.shared.pinned
    return values[: 4 * most + 1].unique().numel() <= most and values.unique().numel() <= most


def _chooser(one: Held) -> Callable[[Tensor, float], Tensor]:
    layer, shape = one.weight.module, one.original.shape
    return lambda scores, share: as_rows(layer, pruning.rechosen(one.weight, from_rows(layer, scores, shape), share))


def _share(one: Held, problem: Problem, rows: Tensor, free: Tensor, integers: int) -> None:
    """Fit the one table of a tensor, and write it."""
    shared = one.shared
    assert shared is not None
    entries, scale = shared.table[0].to(problem.w.dtype), rows
    beside = shared.pinned and one.mask is not None  # then 0 is for what the mask takes, and no other weight has it
    entries = entries[1:] if beside else entries
    if _is_kept(one):
        entries = entries.sort()[0]
        values = Table(entries=entries.expand(*problem.w.shape[:2], -1), scale=scale)
        codes = values.codes(round_to(problem, values))
    else:
        if integers:
            scale = _sizes(problem, free)
            entries = _started(problem, free / scale, scale, len(entries), pinned=shared.pinned and not beside)
        settle = partial(_settled, shared, integers, beside)
        entries, scale, codes, _ = fit_table(
            problem, entries, scale, pinned=shared.pinned and not beside, scaled=bool(integers), settle=settle
        )
    if beside:
        assert problem.keep is not None
        entries, codes = torch.cat((entries.new_zeros(1), entries)), (codes + 1) * problem.keep
    elif shared.pinned:
        codes, entries = _zero_first(codes, entries)
    _write(one, entries.to(shared.table.dtype), codes, scale / rows if integers else None)


def _write(one: Held, table: Tensor, codes: Tensor, scale: Tensor | None) -> None:
    """Give a weight its table (k,), its codes by rows and, where the table is of integers, the scales of its rows."""
    shared, layer, shape, along = one.shared, one.weight.module, one.original.shape, None
    assert shared is not None
    if scale is not None:
        scales = scale.reshape(-1).to(table.dtype)
        quantization.hold_integers(layer, from_rows(layer, table[codes], shape), scales)
        along = _along(scales, one.original, one.weight.out_axis)
    shared.hold(table[None], from_rows(layer, codes, shape), along)
    if scale is None:
        one.weight.trainable.copy_(shared.render())


def _settled(shared: SharedWeights, integers: int, beside: bool, entries: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The table as it will be used: integers under larger scales, or on the grid that its configuration asks for; no 0 beside a mask's."""
    if integers:
        unit = entries.abs().max().clamp(min=1e-30) / integers
        whole = (entries / unit).round() + 0.0
        return torch.where(whole == 0, torch.where(entries < 0, -1.0, 1.0).to(whole), whole) if beside else whole, scale * unit
    if shared.config.table_bits is not None:
        return on_grid(entries[None], shared.config.table_bits)[0], scale
    return entries.float().to(entries.dtype), scale


def _sizes(problem: Problem, free: Tensor) -> Tensor:
    """The size of each row's weights, (groups, rows, 1): where its scale starts."""
    count = free.shape[2] if problem.keep is None else problem.keep.sum(2, keepdim=True).clamp(min=1)
    size = (free.square().sum(2, keepdim=True) / count).sqrt()
    return torch.where(size > 1e-6 * size.max(), size, size.max().clamp(min=1e-20))


def _started(problem: Problem, units: Tensor, scale: Tensor, count: int, *, pinned: bool) -> Tensor:
    """A table for all rows in units of their scales, by k-means, weighed by what each weight's error counts."""
    masses = scale.square() * torch.diagonal(problem.h, dim1=1, dim2=2)[:, None]
    chosen = torch.ones_like(units, dtype=torch.bool) if problem.keep is None else problem.keep
    values, counts = units[chosen].float().cpu().numpy(), masses.expand_as(units)[chosen].float().cpu().numpy()
    table = torch.from_numpy(clustering.kmeans(values, count, importance=counts, pin_zero=pinned)).to(units)
    return torch.cat((table, table[-1:].expand(count - len(table))))


def _zero_first(codes: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and a table whose 0 is entry 0."""
    zero = int(entries.abs().argmin())
    order = [zero, *(i for i in range(len(entries)) if i != zero)]
    place = torch.empty(len(order), dtype=torch.int64, device=codes.device)
    place[torch.tensor(order)] = torch.arange(len(order), device=codes.device)
    return place[codes], entries[order]


def _onto_tables(one: Held, problem: Problem, wide: Tensor) -> None:
    """Give the weights under a table for each group of channels the entries that are best together; the tables stay."""
    shared, shape = one.shared, one.original.shape
    assert shared is not None
    if one.weight.out_axis:
        return  # the rows of a transposed convolution are taps
    table = shared.values().to(problem.w.dtype)  # (tables, k)
    ordered, order = table.repeat_interleave(shared.config.channels_per_table, 0).sort(1)
    values = Table(entries=ordered.reshape(*problem.w.shape[:2], -1), scale=wide[:, :, :1])
    codes = values.codes(round_to(problem, values)).reshape(len(ordered), -1)
    shared.hold(shared.table, order.gather(1, codes).reshape(shape))
    one.weight.trainable.copy_(shared.render())


def _along(factor: Tensor, weight: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return factor.reshape(shape)
