"""A search in a folder: from a recipe, or from anyone's function, to the file, the recipe that makes it again, and the page.

DIR/float/          the run of the recipe's stages that train the float network
DIR/points-….jsonl  what was measured so far; a killed search goes on from there
DIR/model.onnx, searched.yaml, search.json, report.html
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from torchopt.errors import ConfigError, FileError
from torchopt.export import export
from torchopt.io.files import write_text
from torchopt.io.importing import in_users_code, load_callable
from torchopt.quantize.calibration.batch_slices import part
from torchopt.recipe import load, parse
from torchopt.run import final_model, run
from torchopt.run.lock import locked
from torchopt.search.composed import Point
from torchopt.search.result import SearchResult
from torchopt.search.search import search
from torchopt.train import accuracy

FLOAT, MODEL, RECIPE, FOUND, PAGE = "float", "model.onnx", "searched.yaml", "search.json", "report.html"
BATCHES = 16  # of 32 samples of the training part
FUNCTION = re.compile(r"[\w.]+:[\w.]+")
KEYS = ("model", "batches", "evaluate", "example_inputs", "train", "choices")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is searched: the network and its data as arguments of `search`, one call's arguments, and the recipe without its search."""

    given: dict[str, Any]
    recipe: dict[str, Any] | None


def search_in_folder(
    source: str,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    settings: Sequence[str] = (),
    said: Callable[[Point], object] | None = None,
    progress: bool = True,
    **limits: Any,
) -> SearchResult:
    """Search, and leave the result in a folder.

    Args:
        source: a recipe, whose stages before the first that compresses make the float network; or "module:function", which returns a dict
            of `search`'s arguments: model and batches, and evaluate, example_inputs, train, choices where there are some.
        out: the folder; made where it does not exist.
        resume: go on with the search that lies there.
        settings: "key=value" for the recipe.
        said: called with each point.
        progress: show progress bars on stderr.
        limits: `max_drop`, `objective` and the like, as for `search`.

    Raises:
        FileError: there is a search in the folder already.
        ConfigError: the function returns something else.
    """
    place = Path(out)
    if not resume and place.is_dir() and (list(place.glob("points-*.jsonl")) or (place / FOUND).exists()):
        raise FileError(f"{out}: holds a search already; --resume goes on with it, or give another folder by --out")
    with locked(place):
        task = _from_function(source) if FUNCTION.fullmatch(source) and not Path(source).exists() else _from_recipe(
            source, place, settings, progress=progress
        )  # fmt: skip
        with in_users_code("search"):
            found = search(**task.given, folder=place, said=said, progress=progress, **limits)
        _written(found, task, place, str(limits.get("target", "ort-x86")))
    return found


def _from_function(source: str) -> Task:
    """What the user's function returns.

    Raises:
        ConfigError: no dict, a key that `search` does not take, or one missing.
    """
    function = load_callable(source, where="search")
    with in_users_code(f"search: {source}", ConfigError, function):
        given = function()
    if not isinstance(given, Mapping) or not {"model", "batches"} <= set(given) or not set(given) <= set(KEYS):
        told = f"a dict of {', '.join(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(
            f"search: {source} returned {told}; a dict with model and batches is needed, and may have {', '.join(KEYS[2:])}"
        )
    return Task(given=dict(given), recipe=None)


def _from_recipe(source: str, place: Path, settings: Sequence[str], *, progress: bool) -> Task:
    """The float network of a recipe, trained where it is to be, and its data."""
    loaded = load(source, settings)
    stages = list(loaded.plain["stages"])
    first = next((i for i, stage in enumerate(loaded.recipe.stages) if stage.compress or stage.shrink), len(stages))
    plain = {**loaded.plain, "stages": stages[:first]}
    data = loaded.recipe.data.load()
    if first:
        floats = parse(yaml.safe_dump(plain, sort_keys=False), name=loaded.name)
        run(floats, place / FLOAT, resume=True, progress=progress)
        model: nn.Module = final_model(place / FLOAT)[0]
    else:
        model = loaded.recipe.model.build()
    given = {
        "model": model.eval(),
        "batches": data.calibration_batches(BATCHES, seed=loaded.recipe.seed),
        "evaluate": lambda judged: accuracy(judged, data.test_batches()),
        "example_inputs": (data.example,),
    }
    return Task(given=given, recipe=plain)


def _written(found: SearchResult, task: Task, place: Path, target: str) -> None:
    """Leave the file, the recipe, the figures and the page."""
    example = task.given.get("example_inputs") or _first(task.given["batches"])
    example = example if isinstance(example, tuple) else (example,)
    result = export(found.model, example, place / MODEL, target=target)
    if result.size_bytes != found.point.bytes:
        raise FileError(
            f"{place / MODEL}: has {result.size_bytes} bytes, not the {found.point.bytes} that were measured; search again"
        )
    stage = yaml.safe_load(found.recipe)
    if task.recipe is not None:
        searched = {**stage["stages"][0], "calibrate": BATCHES}
        stage = {**task.recipe, "stages": [*task.recipe["stages"], searched]}
    write_text(place / RECIPE, yaml.safe_dump(stage, sort_keys=False, width=120, default_flow_style=None))
    write_text(place / FOUND, json.dumps(found.to_dict(), indent=1) + "\n")
    found.to_html(place / PAGE)


def _first(batches: Any) -> tuple[Any, ...]:
    """One sample of the first batch."""
    batch = batches if hasattr(batches, "shape") else next(iter(batches))
    args = batch if isinstance(batch, tuple | list) else (batch,)
    return part((tuple(args[:1]), {}), 0, 1)[0]
