"""From a recipe to its result: check everything first, carry the stages out, then export, verify, time and report.

    recipe → model, data → stages → baseline.onnx, model.onnx → verify → benchmark → report.html, report.json

Whatever a user can get wrong in a recipe is found before the folder is touched. `report.json` is written last: where it lies, the
run is finished. Scores are of ONNX Runtime, on the files that were written, not of torch.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchopt import recipe as recipes
from torchopt.channels import count_macs
from torchopt.data import Dataset, fingerprint
from torchopt.errors import FileError, ModelError
from torchopt.export import decode_initializers, export
from torchopt.io.files import write_text
from torchopt.io.importing import in_users_code
from torchopt.process.random_state import random_state_kept
from torchopt.recipe import Loaded, Recipe
from torchopt.report import histogram, summary_rows, write_html
from torchopt.report import report as weight_report
from torchopt.rules import assign
from torchopt.run.folder import (
    BASELINE,
    CHECKPOINT,
    MODEL,
    PAGE,
    RECIPE,
    REPORT,
    Folder,
    Position,
    open_folder,
    refuse_other_data,
)
from torchopt.run.lock import locked
from torchopt.run.plans import ended, left_alone, plans
from torchopt.run.ranks import on_first, process_group
from torchopt.run.stages import run_stages, started_model
from torchopt.runtime import benchmark, inspect, session, verify

PARTS = {
    "score": dict,
    "size_bytes": dict,
    "latency_ms": dict,
    "layers": list,
    "placement": dict,
    "verify": dict,
}  # as in a report


@random_state_kept()
def run(
    loaded: Loaded,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    unfinished: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Carry out a recipe and leave its result in a folder.

    Args:
        loaded: what `torchopt.recipe.load` returned.
        out: the folder; made where it does not exist.
        resume: go on with the run that lies there; where there is none, start.
        overwrite: remove the run that lies there and start again.
        unfinished: carry out also what trains too few steps for its schedules to end, as a trial does.
        progress: show progress bars on stderr.

    Returns:
        What `report.json` holds; an empty dict on the ranks of a distributed run that do not write.

    Raises:
        TorchoptError: a mistake in the recipe, the model, the data, or the folder; one that another process is running in.
    """
    recipe = loaded.recipe
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    data = checked(recipe, model)
    for remark in plans(recipe, model, data, unfinished=unfinished):
        warnings.warn(remark, RuntimeWarning, stacklevel=3)
    now = fingerprint(data)
    with process_group() as rank, contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(locked(out)))
        folder = on_first(lambda: open_folder(out, loaded, resume=resume, overwrite=overwrite))
        if on_first(lambda: folder.finished):
            return read_report(out) if rank == 0 else {}
        made = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        first = Position(stage=0, start=model.state_dict(), recipe=loaded.text, data=now, made=made)
        position = on_first(lambda: folder.position(loaded) or first)
        refuse_other_data(out, position, now)
        _say_what_differs(position, made)
        save = folder.save if rank == 0 else lambda position: None
        with in_users_code("run"):
            final = run_stages(recipe, data, position, save, progress=progress and rank == 0)
        if rank > 0:
            return {}
        started = time.monotonic()
        measured = _result(recipe, data, folder, final, position, progress=progress)
        seconds = round(position.seconds + time.monotonic() - started, 1)
        result = {"recipe": loaded.name, "seconds": seconds, "data": data.note, **measured}
        write_html(result, folder[PAGE])
        write_text(folder[REPORT], json.dumps(result, indent=1) + "\n")
    return result


def _say_what_differs(position: Position, made: dict[str, Any]) -> None:
    """A resumed run ends in the same bytes only with the same torch and the same number of threads."""
    then = position.made or made
    different = [f"{name} {then[name]} (now {made[name]})" for name in made if then.get(name) != made[name]]
    if different:
        began = " and ".join(different)
        warnings.warn(
            f"the run was begun with {began}; what comes may differ from it in the last bits", RuntimeWarning, stacklevel=4
        )


def checked(recipe: Recipe, model: nn.Module) -> Dataset:
    """Load the data, and refuse what could only fail later: rules without match, weights that are not finite, other shapes.

    Raises:
        RuleError: a rule matches nothing.
        ModelError: a weight is not finite, or the model does not take the data.
        DataError: the data is empty or not finite.
    """
    for stage in recipe.stages:
        if stage.compress is not None:
            assign(model, stage.compress)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"model: {name} holds NaN or infinity; finite weights are needed")
    data = recipe.data.load()
    try:
        with torch.no_grad(), in_users_code("model"):
            logits = copy.deepcopy(model).eval()(data.example)
    except (RuntimeError, ModelError) as error:
        shape = f"{tuple(data.example.shape)} ({str(data.example.dtype).removeprefix('torch.')})"
        raise ModelError(f"model: does not take the data's inputs of shape {shape}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < len(data.classes):
        given = f"of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"of type {type(logits).__name__}"
        raise ModelError(
            f"model: gives outputs {given} for data of {len(data.classes)} classes; (N, {len(data.classes)}) is needed"
        )
    return data


@random_state_kept()
def matched(recipe: Recipe) -> list[dict[str, Any]]:
    """Return which rule each weight gets in each stage, without touching any data.

    Returns:
        One row a weight and stage: stage, weight, shape, rule, and what is done with it, or why it is left alone.
    """
    model = recipe.model.build()
    rows = []
    for stage in recipe.stages:
        assigned = assign(model, stage.compress) if stage.compress is not None else []
        left = left_alone(model, stage)
        for found in assigned:
            prune, cluster, quantize = found.rule.prune, found.rule.cluster, found.rule.quantize
            name = found.weight.name
            rows.append(
                {
                    "stage": stage.title,
                    "weight": name,
                    "shape": "×".join(map(str, found.weight.value.shape)),
                    "rule": found.rule.match,
                    "prune": left.get((name, "prune"), f"{prune.timing.final:.0%} {prune.pattern}") if prune else None,
                    "cluster": left.get((name, "cluster"), f"{cluster.n_clusters} values") if cluster else None,
                    "quantize": left.get((found.weight.module_name, "quantize"), f"{quantize.mode}, {quantize.weight_bits} bits")
                    if quantize
                    else None,
                }
            )
    return rows


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the `report.json` of a finished run holds.

    Raises:
        FileError: there is none, or it is damaged.
    """
    path = Path(folder) / REPORT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [part for part, kind in PARTS.items() if not isinstance(found, dict) or not isinstance(found.get(part), kind)]
        if missing:
            raise ValueError(f"{missing[0]!r} is missing, or of another kind")
        summary_rows(found)  # what is missing within is named
    except OSError as error:
        raise FileError(f"{path}: cannot be read; the folder of a finished run is needed") from error
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise FileError(f"{path}: is damaged ({error}); run again with --overwrite") from error
    return found


@random_state_kept()
def final_model(folder: str | os.PathLike[str]) -> tuple[nn.Module, torch.Tensor]:
    """Return the final network of a finished run, rebuilt from its checkpoint, and an example input.

    Raises:
        FileError: the folder holds no finished run.
    """
    read_report(folder)
    place = Folder(path=Path(folder))
    loaded = recipes.load(place[RECIPE])
    position = place.position(loaded)
    if position is None:
        raise FileError(f"{folder}: its checkpoint is gone; run again with --overwrite")
    recipe, data = loaded.recipe, loaded.recipe.data.load()
    refuse_other_data(folder, position, fingerprint(data))
    if not ended(recipe, data, position):
        raise FileError(f"{place[CHECKPOINT]}: is of a run that has not ended, beside the report of another; go on with --resume")
    return run_stages(recipe, data, position, lambda _: None), data.example


def accuracy_in_onnx_runtime(path: str | os.PathLike[str], data: Dataset) -> float:
    """Return the share of right answers that an ONNX file gives on the test part."""
    opened = session(path)
    entry = opened.get_inputs()[0]
    size = entry.shape[0] if isinstance(entry.shape[0], int) else 256
    right = 0
    for inputs, labels in data.test_batches(size):
        logits = opened.run(None, {entry.name: inputs.numpy()})[0]
        right += int((np.asarray(logits).argmax(1) == labels.numpy()).sum())
    return right / len(data.test_labels)


def _result(
    recipe: Recipe, data: Dataset, folder: Folder, final: nn.Module, position: Position, *, progress: bool
) -> dict[str, Any]:
    """Write the two ONNX files and measure them."""
    compressed = position.baseline is not None
    before = started_model(recipe, position.baseline).eval() if position.baseline is not None else final
    options = {"target": recipe.export.target, "dynamic_batch": recipe.export.dynamic_batch}
    export(before, (data.example,), folder[BASELINE], pack=False, **options)  # type: ignore[arg-type]
    pack = recipe.export.pack if compressed else False
    export(final.eval(), (data.example,), folder[MODEL], pack=pack, **options)  # type: ignore[arg-type]
    size = 256 if recipe.export.dynamic_batch else 1
    verdict = verify(final, folder[MODEL], [x for x, _ in data.test_batches(size)], progress=progress)
    config = recipe.benchmark
    timing = benchmark([folder[BASELINE], folder[MODEL]], threads=config.threads, repeats=config.repeats, progress=progress)
    first, last = timing.rows
    weights, values = weight_report(folder[MODEL]).to_dict(), decode_initializers(folder[MODEL])
    network = started_model(recipe, position.start, position.plan)  # as the last stage began: with its channels, still plain
    return {
        "score": {
            "name": "accuracy",
            "baseline": accuracy_in_onnx_runtime(folder[BASELINE], data),
            "final": accuracy_in_onnx_runtime(folder[MODEL], data),
            "stages": [
                {"name": stage["name"], "epoch": epoch["epoch"] + 1, "score": epoch["accuracy"]}
                for stage in position.stages
                for epoch in stage["epochs"]
            ],
        },
        "size_bytes": {
            "baseline": folder[BASELINE].stat().st_size,
            "final": folder[MODEL].stat().st_size,
            "baseline_gzip": _gzipped(folder[BASELINE]),
            "final_gzip": _gzipped(folder[MODEL]),
        },
        "latency_ms": {
            "baseline": first.latency_ms,
            "final": last.latency_ms,
            "ratio": last.ratio,
            "threads": timing.threads,
            "baseline_quartiles": [first.low_ms, first.high_ms],
            "final_quartiles": [last.low_ms, last.high_ms],
            "load_baseline": first.load_ms,
            "load_final": last.load_ms,
        },
        "macs": {name: count_macs(m, (data.example,))[0] for name, m in (("baseline", before), ("final", network))},
        "layers": [row | {"histogram": histogram(values[row["name"]])} for row in weights["rows"]],
        "totals": weights["totals"],
        "placement": inspect(folder[MODEL]).to_dict(),
        "verify": verdict.to_dict(),
        "stages": position.stages,
        "skipped": [skip for stage in position.stages for skip in stage["skipped"]],
    }


def _gzipped(path: Path) -> int:
    return len(gzip.compress(path.read_bytes(), 9, mtime=0))
