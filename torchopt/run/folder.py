"""The folder of a run: which files lie in it, when it may be written, and the checkpoint that a killed run goes on from.

Each file is written to a temporary name and renamed, so that a kill at any moment leaves the old one or the whole new one. The
checkpoint holds tensors and plain values only (`torch.load(weights_only=True)` reads it); no pickled code is ever run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchopt import recipe as recipes
from torchopt.channels.plan import Plan
from torchopt.data import changed
from torchopt.errors import FileError, StateError
from torchopt.io.files import atomic_path, write_text
from torchopt.recipe import Loaded

FORMAT = 1
RECIPE, CHECKPOINT, MODEL, BASELINE = "recipe.yaml", "checkpoint.pt", "model.onnx", "baseline.onnx"
REPORT, PAGE = "report.json", "report.html"
FILES = (REPORT, PAGE, MODEL, BASELINE, CHECKPOINT, RECIPE)  # the order in which an old run is removed: its result first
Tensors = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Position:
    """Where a run stands: everything that the steps from here on depend on.

    Attributes:
        stage: number of the stage in work.
        start: the weights that the stage began with.
        plan: the channels that earlier `shrink` stages removed, None for none.
        shrunk: whether the stage in work has removed its channels already.
        kept: what the stage in work could not shrink, and why.
        baseline: the weights before the first compression, None while that has not begun.
        training: the state of the training loop, None before its first save.
        stages: what the stages brought so far, for the report.
        seconds: time spent so far, over all processes that went on with the run.
        recipe: the text of the recipe that the run carries out; None in checkpoints of an older torchopt.
        data: what the samples are (`torchopt.data.fingerprint`), or None likewise.
        made: what decides the last bits beside the recipe: torch's version, the number of threads.
    """

    stage: int
    start: Tensors
    plan: Plan | None = None
    shrunk: bool = False
    kept: list[dict[str, Any]] = field(default_factory=list)
    baseline: Tensors | None = None
    training: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    recipe: str | None = None
    data: dict[str, Any] | None = None
    made: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The folder of one run."""

    path: Path

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        """True where every stage is done and the report, the last file, lies there."""
        return (self.path / REPORT).is_file()

    def save(self, position: Position) -> None:
        """Write the checkpoint.

        Raises:
            FileError: the disk is full, or the folder cannot be written.
        """
        with atomic_path(self[CHECKPOINT]) as temporary:
            try:
                torch.save({"format": FORMAT, **vars(position)}, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                said = str(error).splitlines()[0][:200]
                raise FileError(f"{self[CHECKPOINT]}: cannot be written ({said}); free space and go on with --resume") from error

    def position(self, loaded: Loaded) -> Position | None:
        """Read the checkpoint, or return None where there is none yet.

        Args:
            loaded: the recipe that it must be of.

        Raises:
            FileError: it is damaged, of another format, or of another recipe.
        """
        path = self[CHECKPOINT]
        if not path.is_file():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FileError(f"{path}: is damaged ({type(error).__name__}); start again with --overwrite") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise FileError(f"{path}: is no checkpoint of format {FORMAT}; start again with --overwrite")
        try:
            position = Position(**found)
        except TypeError as error:
            raise FileError(f"{path}: lacks parts of a checkpoint ({error}); start again with --overwrite") from error
        other = None
        if position.recipe is not None:
            other = recipes.first_difference(recipes.parse(position.recipe, name=str(path)).plain, loaded.plain)
        if other is not None or position.stage >= len(loaded.recipe.stages):
            differs = f"{other!r} differs" if other is not None else f"it has no stage {position.stage + 1}"
            raise FileError(
                f"{path}: belongs to another recipe than {RECIPE} beside it ({differs}); start again with --overwrite"
            )
        return position


def open_folder(out: str | os.PathLike[str], loaded: Loaded, *, resume: bool, overwrite: bool) -> Folder:
    """Begin in the folder of a run, which `locked` has made and holds, or take up the old run that lies there.

    Args:
        out: the folder.
        loaded: the recipe of the run.
        resume: go on with the run that lies there, if one does.
        overwrite: remove the run that lies there.

    Raises:
        FileError: the folder cannot be written, or holds a run while neither `resume` nor `overwrite` is given.
        StateError: the run that lies there has another recipe.
    """
    folder = Folder(path=Path(out))
    try:
        _remove(folder.path.glob(".*.part"))
        old = [name for name in FILES if folder[name].exists()]
        if old and overwrite:
            _remove(folder[name] for name in old)
    except OSError as error:
        raise FileError(f"{out}: cannot be written ({error.strerror or error}); give another folder by --out") from error
    if old and not overwrite:
        if not resume:
            raise FileError(f"{out}: holds a run already ({old[-1]}); --resume goes on with it, --overwrite starts again")
        _same_recipe(folder, loaded)
    write_text(folder[RECIPE], loaded.text)
    return folder


def _remove(paths: Any) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _same_recipe(folder: Folder, loaded: Loaded) -> None:
    path = folder[RECIPE]
    if not path.is_file():
        raise FileError(f"{path}: is missing beside the run's other files; start again with --overwrite")
    different = recipes.first_difference(recipes.load(path).plain, loaded.plain)
    if different is not None:
        raise StateError(f"{path}: the run was started with another {different!r}; resume with the same recipe, or --overwrite")


def refuse_other_data(out: str | os.PathLike[str], position: Position, now: dict[str, Any]) -> None:
    """Refuse to go on with a run on other samples than it began with.

    Raises:
        StateError: the data is another.
    """
    different = changed(position.data, now) if position.data is not None else None
    if different is not None:
        raise StateError(
            f"{out}: the data is not what the run began with ({different}); resume with the data of then, or start again by --overwrite"
        )
