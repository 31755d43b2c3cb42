"""What can be known of a run before it starts: whether its schedules end, its teacher knows something, its device is there.

A stage takes epochs · ⌊N / batch⌋ optimizer steps. A schedule that ends later leaves the model less sparse than the recipe says, so it
is refused, with both numbers, unless a trial is asked for.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from torchopt.compress.attach import attach
from torchopt.data import Dataset, epoch_order
from torchopt.errors import ConfigError, DataError, ModelError
from torchopt.io.importing import in_users_code
from torchopt.prune.schedule import reached
from torchopt.recipe import Recipe, Stage
from torchopt.rules import Rule
from torchopt.run.folder import Position
from torchopt.state.counter import require_state
from torchopt.train import Train, accuracy, device_of


def plans(recipe: Recipe, model: nn.Module, data: Dataset, *, unfinished: bool) -> list[str]:
    """Refuse what could only fail, or disappoint, hours later; return what is worth saying.

    Args:
        recipe: the whole recipe.
        model: as it starts.
        data: the samples.
        unfinished: let schedules be cut short, and say so.

    Raises:
        ConfigError: a schedule does not end, there is no teacher or no such device, processes cannot share a batch.
        DataError: augmentation of what are no pictures, fewer samples than processes.
        ModelError: the model cannot be trained on a batch of the size asked for.
    """
    remarks = []
    compresses = next((n for n, stage in enumerate(recipe.stages) if stage.shrink or stage.compress), len(recipe.stages))
    for number, stage in enumerate(recipe.stages):
        if stage.train is None:
            continue
        where = f"stages.{number}.train"
        device_of(stage.train)
        if stage.train.distillation is not None and number < compresses:
            raise ConfigError(
                f"{where}.distill: the teacher is the model before compression, which comes later; leave distill out"
            )
        _check_batches(where, stage.train, model, data)
        taken = steps(stage.train, data)
        for late in _unended(stage, taken):
            said = f"stages.{number}: trains {taken} optimizer steps ({stage.train.epochs} epochs of {taken // stage.train.epochs}), {late}"
            if not unfinished:
                raise ConfigError(f"{said}; train longer, end it earlier, or give --unfinished to try the run out as it is")
            remarks.append(f"{said}; the result is less compressed than the recipe says")
            break
    taught = any(stage.train is not None and stage.train.distillation is not None for stage in recipe.stages)
    return remarks + (_unlearned(model, data) if taught and compresses == 0 else [])


def steps(config: Train, data: Dataset) -> int:
    """Return how many optimizer steps a training takes."""
    count = len(data.train_inputs)
    return config.epochs * (count // min(config.batch_size, count))


def ended(recipe: Recipe, data: Dataset, position: Position) -> bool:
    """True where nothing is left to train from this position on."""
    last = recipe.stages[-1]
    if position.stage + 1 < len(recipe.stages):
        return False
    return last.train is None or (position.training is not None and position.training["step"] == steps(last.train, data))


def left_alone(model: nn.Module, stage: Stage) -> dict[tuple[str, str], str]:
    """Return why a stage leaves weights alone, by weight (for quantization: by module) and technique.

    Static quantization is left out: it is decided on the graph, which needs an input.
    """
    if not stage.compress:
        return {}
    ready = attach(model, [_without_data(rule, trains=stage.train is not None) for rule in stage.compress], None, {}, "ort-x86")
    return {(skip.name, skip.technique): f"none: {skip.reason}" for skip in require_state(ready, "check")[1].skipped}


def _without_data(rule: Rule, *, trains: bool) -> Rule:
    static = rule.quantize is not None and rule.quantize.mode == "static"
    cluster = rule.cluster if trains or rule.cluster is None else replace(rule.cluster, importance="even")
    return replace(rule, quantize=None if static else rule.quantize, cluster=cluster)


def _unended(stage: Stage, taken: int) -> Iterator[str]:
    """What the rules of a stage would still do after so many steps."""
    for number, rule in enumerate(stage.compress or (), 1):
        where = f"and rule {number} (match={rule.match!r})"
        if rule.prune is not None and (now := reached(rule.prune.timing, taken)) < rule.prune.timing.final:
            end = rule.prune.timing.done_step
            yield f"{where} reaches its sparsity of {rule.prune.timing.final:g} at step {end}, by then {now:.3g}"
        if rule.cluster is not None and rule.cluster.soft_until > taken:
            yield f"{where} has soft values until step {rule.cluster.soft_until}"
        if rule.quantize is not None and rule.quantize.milestones is not None and max(rule.quantize.milestones) > taken:
            yield f"{where} has its last milestone at step {max(rule.quantize.milestones)}"


def _check_batches(where: str, config: Train, model: nn.Module, data: Dataset) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % ranks:
        raise ConfigError(f"{where}.batch_size: {config.batch_size} is no multiple of the {ranks} processes that share it")
    if config.augment is not None and data.train_inputs.dim() != 4:
        raise DataError(
            f"{where}.augment: the inputs have the shape {tuple(data.train_inputs.shape)}; pictures (N, C, H, W) are needed"
        )
    share = len(epoch_order(len(data.train_inputs), config.batch_size, seed=0, epoch=0, ranks=ranks)[0]) // ranks
    some = data.train_inputs[: min(2, share)]
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), in_users_code("model"):
            logits = trial(some)
    except (RuntimeError, ValueError, ModelError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"model: cannot be trained on {len(some)} of the {share} samples of a batch: {said}") from error
    if not isinstance(logits, torch.Tensor):
        raise ModelError(
            f"model: gives {type(logits).__name__} in training mode; the logits alone, a tensor (N, classes), are needed"
        )


def _unlearned(model: nn.Module, data: Dataset) -> list[str]:
    """Warn of a teacher whose answers are no better than the most frequent class, by three standard errors."""
    score = accuracy(model, data.test_batches())
    guess = float(data.test_labels.bincount().max()) / len(data.test_labels)
    if score > guess + 3 * (guess * (1 - guess) / len(data.test_labels)) ** 0.5:
        return []
    return [
        f"distill: the teacher is the model as it starts, which gives {score:.1%} right answers, no better than guessing ({guess:.1%}); "
        "train it in an earlier stage, or give model.weights"
    ]
