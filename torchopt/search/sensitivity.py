"""Sensitivity: what each layer does to the outputs under each option, and what it takes in the file.

Noise of different layers adds up, nearly, and so do bytes; so a table of layers and options is enough to choose from, and `search` does.
It is worth looking at by itself: the layers that must be left alone stand out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

import torchopt
from torchopt.channels import count_macs
from torchopt.compress.refusals import refuse_model
from torchopt.errors import ConfigError, DataError, ModelError
from torchopt.io.progress import track
from torchopt.network.batches import Batch, arguments
from torchopt.network.copies import copied
from torchopt.network.standard_layers import known
from torchopt.network.weights import Weight, weights
from torchopt.process.ordinary import alone
from torchopt.process.random_state import random_state_kept
from torchopt.quantize.calibration.batch_slices import part
from torchopt.search.choices import Choices, Option
from torchopt.search.layers.journal import Journal, digest, digest_of, folder_of
from torchopt.search.layers.latency import latencies
from torchopt.search.layers.samples import JUDGE, Samples, outputs, split
from torchopt.search.layers.table import Row, Sensitivity
from torchopt.search.layers.trial import Trial, trials

ARITHMETIC = 8e9  # multiply-adds for the outputs of one option: large networks are judged by fewer samples
FEWEST = 16
LITTLE = 0.001  # of all weights: a layer with fewer has two options, float and the most bits
Evaluate = Callable[[nn.Module], float]


@alone()
@random_state_kept()
def sensitivity(
    model: nn.Module,
    evaluate: Evaluate | None = None,
    *,
    batches: Iterable[Batch],
    example_inputs: tuple[Any, ...] | None = None,
    choices: Choices | None = None,
    latency: bool = False,
    cache: str | os.PathLike[str] | bool = True,
    progress: bool = True,
) -> Sensitivity:
    """Measure what each layer costs under each option, alone: noise at the outputs, bytes in the packed file, time in ONNX Runtime.

    Args:
        model: a trained network; it is not touched.
        evaluate: a score of a model, higher for better; given one, each option is scored by it too, which takes its time each time.
        batches: a few hundred samples, as for `one_shot`: one half shows the solver what layers read, the other judges.
        example_inputs: one call's arguments; the first sample where left out.
        choices: sparsities, numbers of values and bits to try.
        latency: measure the time of each kind and shape of layer in ONNX Runtime too, float and in 8 bits.
        cache: where what was measured is kept, so that the same question is answered at once and a killed call goes on: True is the
            user's own folder (`$TORCHOPT_CACHE` names another), False is nowhere.
        progress: show a progress bar on stderr.

    Returns:
        One row a layer and option; print it, or see `to_dataframe`, `to_json`, `to_html`.

    Raises:
        DataError: no samples, or outputs that are all equal or not finite.
        ModelError: the network has no weights that torchopt compresses.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> found = sensitivity(net, batches=torch.randn(64, 16), choices=Choices(sparsities=(), values=(4,)), cache=False)
        >>> [(row.layer, str(row.option)) for row in found.rows][:3]
        [('0.weight', 'float'), ('0.weight', '8 bits'), ('0.weight', '4 values')]
    """
    plain = plain_of(model)
    samples = split(plain, batches, arguments(example_inputs))
    example = arguments(example_inputs) or first_sample(samples)
    folder = folder_of(cache)
    found = measured(plain, samples, example, choices or Choices(), folder=folder, evaluate=evaluate, progress=progress)
    if latency:
        found = latencies(plain, found, example, folder, progress=progress)
    return found


def plain_of(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, of torch's own layers, whose weights may change.

    Raises:
        ModelError: there is nothing to compress.
        StateError: the model is prepared.
    """
    refuse_model(model)
    plain = copied(known(model)[0]).requires_grad_(True).eval()
    if not weights(plain):
        raise ModelError("sensitivity: the model has no weights that torchopt compresses; a network with layers is needed")
    return plain


def first_sample(samples: Samples) -> tuple[Any, ...] | None:
    """One call's positional arguments with one sample; None where calls have none."""
    args, _ = part(samples.learn[0], 0, 1)
    return tuple(args) or None


def measured(
    plain: nn.Module,
    samples: Samples,
    example: tuple[Any, ...] | None,
    choices: Choices,
    *,
    folder: Any = None,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Return the rows, from the cache where they are known."""
    judged = samples.first(_judges(plain, example))
    asked = options_of(weights(plain), choices)
    about = digest(digest_of(plain), judged.judge, samples.learn, outputs(plain, judged.judge[:1]), torchopt.__version__)
    journal = Journal(None if folder is None else folder / f"layers-{about}.jsonl")
    missing, known_trials = dict[Weight, list[Option]](), dict[tuple[str, Option], Trial]()
    for weight, options in asked.items():
        for option in options:
            found = journal.get(f"{weight.name}: {option}") if evaluate is None else None
            if found is None:
                missing.setdefault(weight, []).append(option)
            else:
                known_trials[weight.name, option] = Trial.of(found)
    scores = dict[tuple[str, Option], float]()
    count = sum(len(options) for options in missing.values())
    if missing:
        for weight, option, trial in track(trials(plain, missing, judged, example), "sensitivity", enabled=progress, total=count):
            journal.put(f"{weight.name}: {option}", trial.plain())
            known_trials[weight.name, option] = Trial.of(trial.plain())
            if evaluate is not None and trial.network is not None:
                scores[weight.name, option] = score_of(evaluate, trial.network)
    rows = [
        _row(weight, option, known_trials[weight.name, option], scores.get((weight.name, option)))
        for weight, options in asked.items()
        for option in options
    ]
    return Sensitivity(rows=rows, samples=judged.judges)


def options_of(listed: Sequence[Weight], choices: Choices) -> dict[Weight, list[Option]]:
    """Return the options of each weight; layers that hold next to nothing have few."""
    total = sum(weight.value.numel() for weight in listed)
    found, options = {}, choices.options()
    for weight in listed:
        if weight.value.numel() >= LITTLE * total:
            found[weight] = options
        else:
            found[weight] = [option for option in options if option.bits is None] + [o for o in options if o.bits is not None][:1]
    return found


def score_of(evaluate: Evaluate, model: nn.Module) -> float:
    """Return the score of a model.

    Raises:
        DataError: it is no finite number.
    """
    given: Any = evaluate(model)
    try:
        score = float(given)
    except (TypeError, ValueError) as error:
        what = "None (does it return its score?)" if given is None else f"{type(given).__name__} {str(given)[:40]!r}"
        raise DataError(f"evaluate: returned {what}; a finite number is needed, higher for better") from error
    if not math.isfinite(score):
        raise DataError(f"evaluate: returned {score}; a finite number is needed, higher for better")
    return score


def _judges(plain: nn.Module, example: tuple[Any, ...] | None) -> int:
    if example is None:
        return FEWEST
    try:
        macs = count_macs(plain, example)[0]
    except ConfigError:
        return FEWEST
    return int(min(JUDGE, max(FEWEST, ARITHMETIC // max(1, macs))))


def _row(weight: Weight, option: Option, trial: Trial, score: float | None) -> Row:
    shape = tuple(weight.value.shape)
    size = min((size.own for size in trial.sizes), default=0)
    return Row(
        layer=weight.name,
        shape=shape,
        option=option,
        loss=trial.loss,
        bytes=size,
        sizes=trial.sizes,
        reason=trial.reason,
        score=score,
    )
