"""Prepare, step, calibrate, finalize: with `attach.py`, the only place where masks, tables and scales meet.

    ŵ = s · T[c]        c = nearest code of (m ⊙ w) / s        T[0] = 0,  m = 0 ⇒ c = 0

The three techniques are blind to one another. They are attached in a fixed order, advanced after each optimizer step, and taken off in
the reverse order. What an earlier round left in the weights (zeros, K distinct values) is found again from the values themselves, so that
rounds of prepare → train → finalize combine in any order that can keep its promise; one that cannot is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.compress.attach import attach, covered
from torchopt.compress.consistency import check_finished, check_intact, warn_of_the_loop
from torchopt.compress.existing import left_behind
from torchopt.compress.fallback_by_latency import faster_rules
from torchopt.compress.refusals import refuse_model
from torchopt.network.batches import Batch, arguments, each
from torchopt.network.copies import copied
from torchopt.network.standard_layers import known
from torchopt.network.weights import custom_weights, note_skipped, weights
from torchopt.process.ordinary import alone
from torchopt.rules import Rule, checked
from torchopt.state.counter import ATTRIBUTE, State, require_state, require_states


@alone()
def prepare(
    model: nn.Module,
    rules: Sequence[Rule],
    example_inputs: tuple[Any, ...] | None = None,
    *,
    preserve: bool = True,
    target: str = "ort-x86",
) -> nn.Module:
    """Return a copy of `model` with masks, shared values and fake quantizers attached, ready to train or to calibrate.

    Args:
        model: any network; it is not touched.
        rules: which weights get what; the first rule that matches a weight decides.
        example_inputs: the positional arguments of one forward call; needed where a rule quantizes activations.
        preserve: keep the zeros and the shared values that are found in the weights, whatever the rules do with them.
        target: the runtime that quantization aims at ("ort-x86", "ort-x86-avx2", "ort-arm", "ort-web").

    Raises:
        RuleError: a rule matches nothing, or acts on nothing.
        ModelError: a weight holds NaN or infinity, or the model cannot be traced for quantization.
        StateError: the model is already prepared, or quantized.
        ConfigError: `Cluster(importance="fisher")`, which `one_shot` finds.

    Example:
        >>> from torchopt import ConstantSparsity, Prune, Rule
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> ready = prepare(net, [Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1)))])
        >>> _ = step(ready)
        >>> float((finalize(ready)[0].weight == 0).float().mean())
        0.5
    """
    refuse_model(model)
    rules, example_inputs = checked(rules), arguments(example_inputs)
    model, said = known(model, partial(covered, rules))
    found = left_behind(weights(model) + custom_weights(model)) if preserve else {}

    def quantized(trial: Sequence[Rule]) -> nn.Module:
        ready = attach(model, trial, example_inputs, found, target)
        if quantization.observes(ready):
            quantization.calibrate(ready, [tuple(example_inputs or ())], progress=False)
        return _baked(ready)

    rules, slower = faster_rules(copied(model), rules, example_inputs, target, quantized)
    ready = attach(model, rules, example_inputs, found, target)
    state = require_state(ready, "prepare")[1]
    state.skipped += slower + said
    state.moved.remember(ready.parameters())
    return ready


def step(model: nn.Module) -> int:
    """Advance every schedule of a prepared model by one; call it after each `optimizer.step()`.

    Args:
        model: what `prepare` returned, bare or wrapped (DistributedDataParallel, torch.compile). Of several prepared networks inside one
            module (a generator and its critic) those are advanced whose weights have moved since their last step.

    Returns:
        The number of optimizer steps taken so far, 1 after the first.

    Raises:
        StateError: the model was not prepared, or distributed ranks disagree on the rules.

    Warns:
        UserWarning: no weight has changed since the last call, though there are gradients; or tables were trained by an optimizer that
            searches along lines.
    """
    parts = require_states(model, "step")
    moved = [part for part in parts if len(parts) == 1 or not part[1].moved.still(part[0].parameters())]
    return max(advance(*part) for part in moved or parts)


def advance(prepared: nn.Module, state: State) -> int:
    """Count one optimizer step of one prepared network, do what is due, and return its number."""
    state.check_ranks()
    warn_of_the_loop(prepared, state)
    number = state.advance()
    pruning.update(prepared, number)
    clustering.update(prepared, number)
    if dist.is_available() and dist.is_initialized():
        quantization.synchronize(prepared)
    quantization.update(prepared, number)
    state.moved.remember(prepared.parameters())
    return number


@alone()
def calibrate(model: nn.Module, batches: Iterable[Batch], *, progress: bool = True) -> nn.Module:
    """Run data through the observers of a prepared model, in place: post-training quantization, or a start for training.

    Where fallback="auto" has left all layers in float, there is nothing to do.

    Args:
        model: what `prepare` returned.
        batches: tensors, tuples, dicts or (input, label) pairs; the leading entries of a tuple are as many inputs as there were example
            inputs.
        progress: show a progress bar on stderr.

    Returns:
        The same model.

    Raises:
        StateError: the model was not prepared, or nothing in it observes data.
        DataError: no batch, NaN in one, or one that does not fit the example inputs.
    """
    prepared, state = require_state(model, "calibrate")
    if not quantization.observes(prepared) and _asks_for_ranges(state):
        return model
    quantization.calibrate(prepared, each(batches), origin=state.origin.network, progress=progress)
    state.origin.network = None
    return model


def _asks_for_ranges(state: State) -> bool:
    """True where a rule asks for activations on grids: if none is there, all its layers were left float."""
    return any(rule.quantize is not None and rule.quantize.mode == "static" for rule in state.rules)


@alone()
def finalize(model: nn.Module, *, unfinished: bool = False) -> nn.Module:
    """Bake masks, tables and scales into ordinary weights and return a plain model; the trainable one stays usable.

    Args:
        model: what `prepare` returned, bare or wrapped.
        unfinished: bake masks and tables as they are, also where their schedules have not come to an end (early stopping).

    Raises:
        StateError: the model was not prepared, a schedule has not reached its final sparsity, shared values are still soft, a layer is
            not rounded yet, an activation quantizer has not seen data, or something (an average of models) has written over masks, codes
            or the step counter; the model is as before.
    """
    prepared, state = require_state(model, "finalize")
    check_intact(prepared, state)
    if not unfinished:
        check_finished(prepared, int(state.step))
    plain = _baked(prepared)
    note_skipped(plain, state.skipped)
    return plain


def _baked(prepared: nn.Module) -> nn.Module:
    plain = copy.deepcopy(prepared)
    quantization.stop_rounding(plain)
    clustering.bake(plain)
    pruning.bake(plain)
    plain = quantization.bake(plain)
    if ATTRIBUTE in plain._modules:
        del plain._modules[ATTRIBUTE]
    return plain
