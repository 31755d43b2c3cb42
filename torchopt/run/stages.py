"""The stages of a recipe, one after the other: shrink, prepare, calibrate, train, finalize; resumable after each saved step.

A stage depends on the weights that it starts with, and on nothing else that came before. So the position of a run is (stage,
start, state of the training loop): resuming builds the network, gives it the start's shapes and weights, attaches the stage's
compression to it again, and loads the loop's state over that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from torchopt.channels import skipped_of
from torchopt.channels.plan import Plan, apply_plan, plan_of
from torchopt.compress.one_shot import one_shot
from torchopt.compress.shrink import shrink
from torchopt.compress.verbs import calibrate, finalize, prepare, step
from torchopt.data import Dataset
from torchopt.prune import unfinished
from torchopt.recipe import Recipe, Shrink
from torchopt.report import report as weight_report
from torchopt.run.folder import Position, Tensors
from torchopt.state.counter import require_state
from torchopt.train import Train, accuracy, train

CALIBRATION_BATCHES = 32  # what a stage without training uses where `calibrate` is left at 0
Save = Callable[[Position], None]
Rows = list[dict[str, Any]]


def run_stages(recipe: Recipe, data: Dataset, position: Position, save: Save, *, progress: bool = True) -> nn.Module:
    """Carry the run from `position` to the end of its last stage.

    Args:
        recipe: the whole recipe.
        data: the samples.
        position: where the run stands; moved on in place.
        save: called with the position whenever a resumed run could go on from it.
        progress: show progress bars on stderr.

    Returns:
        The model that the last stage leaves: plain, on the CPU.
    """
    started = time.monotonic() - position.seconds

    def save_now(position: Position) -> None:
        position.seconds = time.monotonic() - started
        save(position)

    while True:
        stage = recipe.stages[position.stage]
        if position.baseline is None and (stage.shrink or stage.compress):
            position.baseline = position.start
        model = started_model(recipe, position.start, position.plan)
        if stage.shrink is not None and not position.shrunk:
            model = _shrunken(model, data, stage.shrink)
            position.start, position.plan, position.shrunk = _copied(model), plan_of(model), True
            position.kept = [asdict(skip) for skip in skipped_of(model)]
            save_now(position)
        model, epochs, skipped = _compressed(model, recipe, data, position, save_now, progress=progress)
        score = accuracy(model, data.test_batches())
        position.seconds = time.monotonic() - started
        seconds = round(position.seconds - sum(s["seconds"] for s in position.stages), 1)
        found = {"name": stage.title, "score": score, "epochs": epochs, "skipped": position.kept + skipped, "seconds": seconds}
        position.stages.append(found)
        if position.stage + 1 == len(recipe.stages):
            return model
        position.stage += 1
        position.start, position.plan, position.shrunk, position.training = _copied(model), plan_of(model), False, None
        position.kept = []
        save_now(position)


def started_model(recipe: Recipe, weights: Tensors, plan: Plan | None = None) -> nn.Module:
    """Return the recipe's network with the given shapes and weights."""
    model = recipe.model.build()
    if plan:
        apply_plan(model, plan)
    model.load_state_dict(weights, strict=True)
    return model


def _copied(model: nn.Module) -> Tensors:
    return {name: t.detach().clone() if isinstance(t, torch.Tensor) else t for name, t in model.state_dict().items()}


def _compressed(
    model: nn.Module, recipe: Recipe, data: Dataset, position: Position, save: Save, *, progress: bool
) -> tuple[nn.Module, Rows, Rows]:
    """Do the stage's compression and training; return the plain model, the epochs, and the weights left alone."""
    stage = recipe.stages[position.stage]
    if stage.compress is None:
        return model, _trained(model, stage.train, recipe, data, position, save, None, progress=progress), []
    example = (data.example,)
    if stage.train is None:
        batches = data.calibration_batches(stage.calibrate or CALIBRATION_BATCHES, seed=recipe.seed)
        target = recipe.export.target
        return one_shot(model, stage.compress, batches, example_inputs=example, target=target, progress=progress), [], []
    ready = prepare(model, stage.compress, example, target=recipe.export.target)
    if stage.calibrate and position.training is None:
        calibrate(ready, data.calibration_batches(stage.calibrate, seed=recipe.seed), progress=progress)
    epochs = _trained(ready, stage.train, recipe, data, position, save, step, progress=progress)
    skipped = weight_report(ready).to_dict()["skipped"] + _stopped_early(ready)
    return finalize(ready, unfinished=True), epochs, skipped


def _stopped_early(ready: nn.Module) -> Rows:
    """Rows of the report for masks less sparse than the recipe asks for, as in a trial run with fewer epochs."""
    taken = int(require_state(ready, "run")[1].step)
    reason = "training ended at step {}, with sparsity {:.3g} of {:g}, which the schedule reaches at step {}"
    return [
        {"name": u.name, "technique": "prune", "reason": reason.format(taken, u.sparsity, u.final, u.done_step)}
        for u in unfinished(ready, taken)
    ]


def _trained(
    model: nn.Module,
    config: Train | None,
    recipe: Recipe,
    data: Dataset,
    position: Position,
    save: Save,
    after_step: Callable[[nn.Module], object] | None,
    *,
    progress: bool,
) -> Rows:
    if config is None:
        return []
    teacher = started_model(recipe, position.baseline) if config.distill and position.baseline is not None else None

    def save_training(state: dict[str, object]) -> None:
        position.training = state
        save(position)

    epochs = train(
        model,
        data,
        config,
        seed=recipe.seed + position.stage,
        teacher=teacher,
        after_step=after_step,
        resume=position.training,
        save=save_training,
        description=f"{recipe.stages[position.stage].title}, {config.epochs} epochs",
        progress=progress,
    )
    return [asdict(epoch) for epoch in epochs]


def _shrunken(model: nn.Module, data: Dataset, config: Shrink) -> nn.Module:
    torch.manual_seed(0)
    goals = {field.name: getattr(config, field.name) for field in fields(config)}
    return shrink(model, (data.example,), **goals)
