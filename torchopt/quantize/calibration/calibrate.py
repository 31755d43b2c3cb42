"""Calibration: run data through the observers of a prepared model, and fix the range of every activation.

Each observer sees each batch once and keeps state of a fixed size; the ranges are chosen when the data ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchopt.errors import DataError, StateError
from torchopt.io.progress import track
from torchopt.network.batches import Batch, model_inputs
from torchopt.network.weights import weights
from torchopt.quantize.calibration.batch_slices import Call, in_pieces, samples_of
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.calibration.output_error import choose_ranges
from torchopt.quantize.calibration.proving import Origin
from torchopt.quantize.corrections import ahead, correct, undisturbed
from torchopt.quantize.graph.naming import name_of_value
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.state.counter import find_state


@torch.no_grad()
def synchronize(model: nn.Module) -> None:
    """Give every activation range what one process would have seen: the ends over all ranks, in one reduction.

    Unions and moving averages are monotonic in what a batch ranges over, so the widest of the ranks' averages is the average of the whole
    batches' ranges. Ranges that the ranks agree on stay untouched, and with them scales that were learned since.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer) and not m.fixed and m.calibrated]
    if not quantizers:
        return
    ends = torch.stack([torch.stack([q.min_val, -q.max_val, -q.min_val, q.max_val]) for q in quantizers])
    dist.all_reduce(ends, dist.ReduceOp.MIN)
    for quantizer, (low, minus_high, minus_other_low, other_high) in zip(quantizers, ends.cpu(), strict=True):
        if low != -minus_other_low or other_high != -minus_high:
            quantizer.represent(low, -minus_high)


def observes(model: nn.Module) -> bool:
    """True where some activation quantizer chooses its range from data."""
    return any(isinstance(m, ActivationQuantizer) and not m.fixed for m in model.modules())


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Batch], *, origin: nn.Module | None = None, progress: bool = True) -> None:
    """Run data through the observers, in evaluation mode, set the ranges that they chose, and correct the weights, in place.

    Args:
        model: what `attach` returned.
        batches: the data.
        origin: the float network that the model was made of; given one, the first batch proves that both are one function.
        progress: show progress bars on stderr.

    Raises:
        StateError: nothing in the model observes data.
        DataError: no batch, or an activation that is not finite.
        ModelError: a correction meets weights that it would spoil, or the model is not the float network on the first batch.
    """
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer) and not m.fixed}
    if not quantizers:
        raise StateError("calibrate: nothing in this model observes data; quantize with mode='static' in prepare")
    training = model.training
    model.eval()
    try:
        whole = any(quantizer.observer.whole for quantizer in quantizers.values())
        pieces = in_pieces(model, _calls(model, batches), _lengths(model), whole=whole)
        calls, samples = ahead(model, _proven(origin, model, pieces))
        if _observe(model, list(quantizers.values()), track(calls, "calibrate", enabled=progress)) == 0:
            raise DataError("calibrate: the loader gave no batch; give at least one")
        for name, quantizer in quantizers.items():
            _set_range(model, name, quantizer)
        choose_ranges(model, samples)
        correct(model, samples, progress=progress)
    finally:
        model.train(training)


def _proven(origin: nn.Module | None, model: nn.Module, calls: Iterable[list[Call]]) -> Iterator[list[Call]]:
    """Yield the calls, after the first piece of the first has proved that nothing but rounding was changed."""
    for count, pieces in enumerate(calls):
        if count == 0 and origin is not None and all(torch.equal(w.value, w.trainable) for w in weights(model)):
            before = Origin(origin, pieces[:1])
            before.prove(model, "preparing")
            before.prove_training(model)
        yield pieces


def _set_range(model: nn.Module, name: str, quantizer: ActivationQuantizer) -> None:
    """Choose the range.

    Raises:
        DataError: what was seen is not finite.
    """
    low, high = quantizer.observer.range()
    if not bool(torch.isfinite(torch.stack([low, high])).all()):
        raise DataError(
            f"calibrate: {name_of_value(model, name)} is NaN or infinite on this data, so it has no range; clean the data, or leave the "
            "layers around it out of the rules"
        )
    quantizer.set_range(low, high)


def _observe(model: nn.Module, quantizers: Sequence[ActivationQuantizer], calls: Iterable[Sequence[Call]]) -> int:
    """Run all calls, each given as its pieces, through the observers; return how many there were."""
    count = 0
    for quantizer in quantizers:
        quantizer.observer.reset()
        quantizer.calibrating = True
    try:
        with undisturbed(model), folded_once(model.modules()):
            for count, pieces in enumerate(calls, 1):  # noqa: B007
                for args, kwargs in pieces:
                    model(*args, **kwargs)
                for quantizer in quantizers:
                    quantizer.observer.end_batch()
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
    return count


def _calls(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Call]:
    """Yield the arguments of one call a batch.

    Raises:
        DataError: a batch is not finite, or does not fit the example inputs.
    """
    for count, batch in enumerate(batches):
        args, kwargs = model_inputs(model, batch)
        _fits(model, args, count)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        if not all(_is_finite(x) or _is_mask(x) for x in given):
            raise DataError(f"calibrate: batch {count} holds NaN or infinity; clean the data")
        if samples_of((args, kwargs)) == 0:
            raise DataError(f"calibrate: batch {count} holds no sample; leave empty batches out")
        yield args, kwargs


def _lengths(model: nn.Module) -> list[int | None]:
    """The lengths of the example inputs along the first axis; None for what has none."""
    found = find_state(model)
    shown = found[1].example_inputs or () if found is not None else ()
    return [told[0][0] if not isinstance(told, Mapping) and told[0] else None for told in shown]


def _fits(model: nn.Module, args: tuple[Any, ...], count: int) -> None:
    """Compare the inputs after the first with the example inputs: a label in the place of one would pass for it.

    Raises:
        DataError: one is of another kind.
    """
    found = find_state(model)
    shown = found[1].example_inputs or () if found is not None else ()
    for place, (x, told) in enumerate(zip(args, shown, strict=False)):
        if place == 0 or not isinstance(x, torch.Tensor) or isinstance(told, Mapping):
            continue
        shape, name = told
        dtype = getattr(torch, name)
        same_kind = x.is_floating_point() == dtype.is_floating_point and (x.dtype == torch.bool) == (dtype == torch.bool)
        if not same_kind or (x.dim() != len(shape) and x.dim() and shape):
            raise DataError(
                f"calibrate: entry {place} of batch {count} is {str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}, in the "
                f"example inputs it is {name} of shape {list(shape)}; give the inputs as they were there, labels after them"
            )


def _is_finite(x: torch.Tensor) -> bool:
    """True without NaN and infinity: both show in the ends, which take one pass and no memory."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _is_mask(x: torch.Tensor) -> bool:
    """True for a mask that is added to attention's scores: 0 and −∞ alone."""
    return bool(((x == 0) | (x == -torch.inf)).all())
