"""Masks, tables and scales are put on a network: quantization swaps modules first, then masks stand on the weights, then tables under them.

What an earlier round left in the weights (zeros, K distinct values) is given by whoever calls, found again from the values themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.channels.plan import plan_of
from torchopt.cluster import Cluster
from torchopt.compress.existing import Left
from torchopt.compress.refusals import refuse_weights
from torchopt.errors import RuleError
from torchopt.network.copies import copied, twin
from torchopt.network.standard_layers import known
from torchopt.network.weights import Skipped, Weight, find_weight, weights
from torchopt.prune import ConstantSparsity, Prune
from torchopt.rules import Assigned, Rule, assign
from torchopt.state.counter import ATTRIBUTE, State

UNUSED = "its result is not used"


def attach(
    model: nn.Module, rules: Sequence[Rule], example_inputs: tuple[Any, ...] | None, found: Mapping[str, Left], target: str
) -> nn.Module:
    """Return a copy of `model` prepared by `rules`, with what earlier rounds left given; loading a checkpoint repeats this."""
    model, _ = known(model, partial(covered, rules))
    ready, plan = copied(model), plan_of(model)
    origin = twin(ready)
    assigned = assign(ready, rules)
    refuse_weights(assigned)
    coupled = pruning.couple(model, _prunes(assigned), example_inputs)
    ready, records = _attach_scales(ready, assigned, example_inputs, target)
    skipped = [skip for record in records for skip in record.skipped] + _attach(ready, assigned, found, coupled)
    quantization.decide_scales(ready)
    quantization.round_for_readers(ready)
    state = State(rules, [a.weight.name for a in assigned], target, _signature(example_inputs), found, skipped, plan, origin)
    state.records = tuple(records)
    state.frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    ready.add_module(ATTRIBUTE, state)
    return ready


def covered(rules: Sequence[Rule], model: nn.Module) -> set[str]:
    """The names of the weights that rules reach."""
    return {a.weight.name for a in assign(model, rules)}


def _attach_scales(
    model: nn.Module, assigned: Sequence[Assigned], example_inputs: tuple[Any, ...] | None, target: str
) -> tuple[nn.Module, list[quantization.Record]]:
    assignment = {a.weight.module_name: a.rule.quantize for a in assigned if a.rule.quantize is not None}
    if not assignment:
        return model, []
    custom: dict[str, list[str]] = {}
    for a in assigned:
        if a.weight.kind == "custom":
            custom.setdefault(a.weight.module_name, []).append(a.weight.param)
    return quantization.attach(model, assignment, example_inputs, target=target, params=custom)


def _prunes(assigned: Sequence[Assigned]) -> dict[str, Prune]:
    return {a.weight.module_name: a.rule.prune for a in assigned if a.rule.prune is not None}


def _attach(
    model: nn.Module, assigned: Sequence[Assigned], found: Mapping[str, Left], coupled: pruning.Coupled | None
) -> list[Skipped]:
    """Put masks, then tables, on the weights that the rules ask for and on those where an earlier round left some."""
    by_name = {a.weight.name: a.rule for a in assigned}
    there = {weight.name: weight for weight in weights(model)}
    masks: list[tuple[Weight, Prune]] = []
    tables: list[tuple[Weight, Cluster]] = []
    unused: list[Skipped] = []  # quantization has left them out of its graph, and reported so for itself
    there_is = dict(model.named_modules())
    for name in dict.fromkeys([*by_name, *found]):
        weight, rule = there.get(name) or find_weight(model, name), by_name.get(name, Rule())
        if weight is None and name.rpartition(".")[0] in there_is:
            raise RuleError(f"prepare: {name} has no counterpart in the quantized model; leave it out of quantization")
        if weight is None:
            unused += [Skipped(name=name, technique=technique, reason=UNUSED) for technique in _asked(rule)]
            continue
        zeros, distinct = found.get(name, (0, 0))
        own = rule.prune is not None and rule.prune.scope != "coupled"
        if own or (zeros and not (coupled is not None and name in coupled.tensors)):
            kept = Prune(schedule=ConstantSparsity(target_sparsity=0.0), include_depthwise=True)
            masks.append((weight, rule.prune if own and rule.prune else kept))
        if rule.cluster or distinct - bool(zeros) > 1:  # one value beside zero is no table
            tables.append((weight, rule.cluster or Cluster(n_clusters=max(2, distinct), include_depthwise=True)))
    skipped = unused + _frozen(masks, "prune") + _frozen(tables, "cluster")
    masks, tables = _trainable(masks), _trainable(tables)
    skipped += pruning.attach(masks, preserve=bool(found)) if masks else []
    if coupled is not None:
        pruning.attach_coupled(model, coupled, preserve=bool(found))
        skipped += coupled.skipped
    skipped += clustering.attach(tables, preserve=bool(found)) if tables else []
    return skipped


def _asked(rule: Rule) -> list[str]:
    return [technique for technique in ("prune", "cluster") if getattr(rule, technique) is not None]


def _trainable(pairs: list[tuple[Weight, Any]]) -> list[tuple[Weight, Any]]:
    return [(weight, config) for weight, config in pairs if weight.trainable.requires_grad]


def _frozen(pairs: list[tuple[Weight, Any]], technique: str) -> list[Skipped]:
    """Frozen weights stay as they are, and are reported; when a technique would act on frozen weights only, that is an error."""
    frozen = [weight.name for weight, _ in pairs if not weight.trainable.requires_grad]
    if frozen and len(frozen) == len(pairs):
        raise RuleError(f"prepare: {frozen[0]} is frozen (requires_grad=False), {technique} has nothing to act on; unfreeze it")
    return [Skipped(name=name, technique=technique, reason="frozen (requires_grad=False)") for name in frozen]


def _signature(example_inputs: tuple[Any, ...] | None) -> list[Any] | None:
    """Shapes and dtypes of the example inputs, enough to trace the model again when a checkpoint is loaded; plain values as they are."""
    if example_inputs is None:
        return None
    plain = (bool, int, float, str)
    return [
        (list(x.shape), str(x.dtype).removeprefix("torch."))
        if isinstance(x, torch.Tensor)
        else {"value": x if isinstance(x, plain) else None}
        for x in example_inputs
    ]
