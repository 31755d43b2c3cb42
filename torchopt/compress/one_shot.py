"""Compression without training: one call from a trained network to a plain, smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.compress.compensate import compensate, held_weights
from torchopt.compress.fallback_by_score import Evaluate, accurate
from torchopt.compress.refusals import refuse_model
from torchopt.compress.verbs import calibrate, finalize, prepare
from torchopt.errors import ConfigError
from torchopt.network.batch_norm import reestimate_batch_norm
from torchopt.network.batches import Batch, arguments, each, model_inputs
from torchopt.network.copies import copied
from torchopt.network.gradients import Gradients, Loss, sample_gradients
from torchopt.network.standard_layers import known
from torchopt.network.weights import find_weight
from torchopt.process.ordinary import alone
from torchopt.quantize.calibration.batch_slices import Call, in_pieces, kept
from torchopt.rules import Rule, assign
from torchopt.state.counter import require_state

SAMPLES = 128  # that the solver learns from
UNSEEN = 0.01  # of the mean importance, added to each weight's: the samples are few, and what they did not touch counts too


def one_shot(
    model: nn.Module,
    rules: Sequence[Rule],
    batches: Iterable[Batch] | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float = 0.005,
    reestimate: bool = False,
    target: str = "ort-x86",
    progress: bool = True,
) -> nn.Module:
    """Compress without training: masks at their schedules' final sparsity, tables by k-means, scales by calibration.

    Args:
        model: a trained network; it is not touched.
        rules: as for `prepare`.
        batches: data for observers, for scores and importances that need some, and for batch-norm re-estimation; needed where activations
            are quantized.
        example_inputs: as for `prepare`.
        loss: `loss(outputs, labels)` → a scalar tensor, for the scores "taylor" and "movement" of `Prune` and for
            `Cluster(importance="fisher")`. Without one, "taylor" and "fisher" measure what each weight does to the outputs, and need
            no labels.
        evaluate: a score of a model, higher for better, such as its accuracy on data that is not in `batches`. Given one, as few layers
            as possible whose rule says `Quantize(fallback="auto")` stay float, the most harmful first, so that the score is at most
            `max_drop` below the float model's; about 2·log₂(layers) models are made and scored.
        max_drop: in the units of `evaluate`.
        reestimate: run `batches` through the pruned or clustered model and renew its batch-norm statistics.
        target: as for `prepare`.
        progress: show progress bars on stderr.

    Returns:
        A plain model.

    Raises:
        ConfigError: a score or an importance needs data, and there is none, or a loss, and there is none; `evaluate` without
            fallback="auto".
        TargetError: `evaluate` stays too low with every layer in float.

    Example:
        >>> from torchopt import Cluster
        >>> net = nn.Linear(16, 16)
        >>> small = one_shot(net, [Rule("*", cluster=Cluster(n_clusters=4))])
        >>> len(small.weight.unique())
        4
        >>> data = [torch.randn(32, 16)]
        >>> len(one_shot(net, [Rule("*", cluster=Cluster(n_clusters=4, importance="fisher"))], data).weight.unique())
        4
    """
    rules, plain = [rules] if isinstance(rules, Rule) else list(rules), _unfrozen(model)
    refuse_model(plain)
    batches, example_inputs = None if batches is None else each(batches), arguments(example_inputs)
    asked = _by_gradients(plain, rules, batches, loss)
    data = list(batches) if batches is not None and evaluate is not None else batches  # which is read again for each trial
    ready = partial(_ready, plain, data, asked, loss, example_inputs, reestimate=reestimate, target=target, progress=progress)
    if evaluate is not None:
        return accurate(model, rules, ready, list(data or ()), evaluate, max_drop)
    return finalize(ready(rules), unfinished=True)  # `finish` has set the final sparsity, ahead of every schedule


@alone()
def _ready(
    plain: nn.Module,
    batches: Iterable[Batch] | None,
    asked: dict[str, bool],
    loss: Loss | None,
    example_inputs: tuple[Any, ...] | None,
    rules: Sequence[Rule],
    *,
    reestimate: bool,
    target: str,
    progress: bool,
) -> nn.Module:
    """The prepared model with its masks at their final sparsity, its tables fitted and its ranges known."""
    ready = prepare(plain, [_evenly(rule) for rule in rules], example_inputs, target=target)
    held = held_weights(ready, [name for name, fisher in asked.items() if fisher]) if batches is not None else []
    again = bool(asked or held) or pruning.observes(ready) or reestimate  # then the batches are read more than once
    batches = list(batches) if batches is not None and again else batches
    if batches is not None and pruning.observes(ready):
        _run(ready, batches)
    masses = _gathered(plain, ready, asked, batches, loss, progress=progress) if batches is not None and asked else {}
    if pruning.finish(ready) or masses:
        clustering.refit(ready, masses)
    if batches is not None and held:
        compensate(ready, held, _samples(ready, batches), origin=plain, progress=progress)
    if batches is not None and reestimate:
        reestimate_batch_norm(ready, batches)
    if batches is not None and quantization.observes(ready):
        calibrate(ready, batches, progress=progress)
    return ready


@alone()
def _unfrozen(model: nn.Module) -> nn.Module:
    """A copy whose weights may all change: freezing is about training, and nothing trains in one shot."""
    return copied(known(model)[0]).requires_grad_(True)


def _by_gradients(model: nn.Module, rules: Sequence[Rule], batches: object, loss: object) -> dict[str, bool]:
    """The weights whose rule asks for gradients, by name: True where k-means is to weigh by them.

    Raises:
        ConfigError: there is no data, or no loss where there must be one.
    """
    asked = {}
    for found in assign(model, rules):
        fisher = found.rule.cluster is not None and found.rule.cluster.importance == "fisher"
        score = found.rule.prune.score if found.rule.prune is not None else ""
        if score == "hessian" and batches is None:
            raise ConfigError(
                f"one_shot: {found.weight.name}: score='hessian' needs data; give batches, a hundred samples are plenty"
            )
        if fisher or score in pruning.GATHERS:
            asked[found.weight.name] = fisher
            what = "importance='fisher'" if fisher else f"score={score!r}"
            if batches is None:
                raise ConfigError(f"one_shot: {found.weight.name}: {what} needs data; give batches, a hundred samples are plenty")
            if score == "movement" and loss is None:
                raise ConfigError(f"one_shot: {found.weight.name}: score='movement' needs a loss to move against; give loss=")
    return asked


def _evenly(rule: Rule) -> Rule:
    """The rule for `prepare`: tables are found anew once importances are known, and scales that nothing trains are fixed ones."""
    if rule.cluster is not None and rule.cluster.importance != "even":
        rule = replace(rule, cluster=replace(rule.cluster, importance="even"))
    if rule.quantize is not None and rule.quantize.learn_scale:
        rule = replace(rule, quantize=replace(rule.quantize, learn_scale=False))
    return rule


def _gathered(
    plain: nn.Module, ready: nn.Module, asked: dict[str, bool], batches: Iterable[Batch], loss: Loss | None, *, progress: bool
) -> Gradients:
    """Give the masks of `ready` what their scores gather, and return the importances for k-means, by weight names of `ready`."""
    names = {name: weight.name for name in asked if (weight := find_weight(ready, name)) is not None}
    squares: Gradients = {}
    shown = require_state(ready, "one_shot")[1].example_inputs
    for gradients in sample_gradients(plain, list(names), batches, loss, progress=progress, example_inputs=shown):
        pruning.gather(ready, {names[name]: gradient for name, gradient in gradients.items()})
        for name, gradient in gradients.items():
            if asked[name]:
                square = gradient.float().square()
                squares[names[name]] = squares[names[name]].add_(square) if names[name] in squares else square
    return {name: square + UNSEEN * square.mean() for name, square in squares.items() if bool(square.any())}


def _samples(model: nn.Module, batches: Iterable[Batch]) -> list[Call]:
    """The first calls, in pieces, that the solver learns from."""
    calls = (model_inputs(model, batch) for batch in batches)
    return kept((piece for pieces in in_pieces(model, calls) for piece in pieces), SAMPLES)


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Forward passes in evaluation mode, for what listens to them."""
    training = model.training
    model.eval()
    for batch in batches:
        args, kwargs = model_inputs(model, batch)
        model(*args, **kwargs)
    model.train(training)
