"""Recipes: one YAML file that says everything about a run, one to one with the configuration classes.

Reading is strict and touches neither data nor model: every error names file, line and key path. Values given on the command line
(`--set train.epochs=1`) are put into the parsed YAML before it is typed, so that they meet the same checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal

import yaml

from torchopt.data import Digits, FashionMnist, ImageFolder, ImportedData, SpokenDigits
from torchopt.errors import ConfigError, FileError, nearest
from torchopt.io import schema as strict
from torchopt.io.schema import Path
from torchopt.io.yaml_lines import line_of, put, read_yaml
from torchopt.models import ImportedModel, ReferenceModel
from torchopt.rules import Rule
from torchopt.train import Train

TARGETS = ("ort-x86", "ort-x86-avx2", "ort-arm", "ort-web", "openvino")


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Structured pruning: channels really removed. Exactly one of ratio, max_macs and max_latency_ms is given.

    Attributes:
        ratio: fraction of the channels to remove, in (0, 1), or fractions by layer: globs over layer names, the first match decides.
        max_macs: multiply-adds to stay below.
        max_latency_ms: latency in ONNX Runtime to stay below, milliseconds.
        importance: how channels are ranked ("magnitude", "lamp", "fpgm", "bn_scale", "random").
        round_to: channels stay a multiple of this; 8, or 16 for a latency.
        ignore: globs of modules whose channels all stay.
        global_ranking: rank the channels of all layers together.
        isomorphic: rank layers with dependencies of the same shape together.
    """

    ratio: float | Mapping[str, float] | None = None
    max_macs: int | None = None
    max_latency_ms: float | None = None
    importance: Literal["magnitude", "lamp", "fpgm", "bn_scale", "random"] = "magnitude"
    round_to: int | None = None
    ignore: Sequence[str] = ()
    global_ranking: bool = False
    isomorphic: bool = False

    def __post_init__(self) -> None:
        goals = [name for name in ("ratio", "max_macs", "max_latency_ms") if getattr(self, name) is not None]
        if len(goals) != 1:
            raise ConfigError(f"Shrink: got {goals or 'no goal'}; exactly one of ratio, max_macs and max_latency_ms is needed")
        fractions = [] if self.ratio is None else [*self.ratio.values()] if isinstance(self.ratio, Mapping) else [self.ratio]
        if not all(0 < fraction < 1 for fraction in fractions) or self.ratio == {}:
            raise ConfigError(f"Shrink.ratio: got {self.ratio}; a fraction in (0, 1) is needed")
        for name in ("max_macs", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"Shrink.{name}: got {value}; a number above 0 is needed")
        if self.round_to is not None and self.round_to < 1:
            raise ConfigError(f"Shrink.round_to: got {self.round_to}; at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: remove channels, attach compression, calibrate, train; what is given, in this order.

    Attributes:
        name: what the report calls it; None makes one up from what it does.
        shrink: remove channels first.
        compress: rules; masks, shared values and fake quantizers are attached, and baked when the stage ends.
        calibrate: batches of 32 training inputs to run through the observers before training; 0 for none.
        train: the training; None for compression in one shot.
    """

    name: str | None = None
    shrink: Shrink | None = None
    compress: Sequence[Rule] | None = None
    calibrate: int = 0
    train: Train | None = None

    def __post_init__(self) -> None:
        if self.shrink is None and self.compress is None and self.train is None:
            raise ConfigError("Stage: does nothing; at least one of shrink, compress and train is needed")
        if self.calibrate < 0:
            raise ConfigError(f"Stage.calibrate: got {self.calibrate}; a number of batches, at least 0")
        if self.calibrate and self.compress is None:
            raise ConfigError("Stage.calibrate: there is nothing to calibrate without compress; add rules that quantize")

    @property
    def title(self) -> str:
        """The stage's name, or what it does in a few words."""
        if self.name is not None:
            return self.name
        rules = self.compress or ()
        words = ["shrink"] if self.shrink else []
        words += [what for what in ("prune", "cluster", "quantize") if any(getattr(r, what) is not None for r in rules)]
        return " + ".join(words) if words else "train"


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the final model is written.

    Attributes:
        target: the runtime aimed at.
        pack: "auto" (what pays on the target), "smallest" (near the entropy; loading takes longer), true or false.
        dynamic_batch: let the batch axis have any size.
    """

    target: str = "ort-x86"
    pack: bool | str = "auto"
    dynamic_batch: bool = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"Export.target: {self.target!r} is not one of {', '.join(TARGETS)}{nearest(self.target, TARGETS)}")
        if self.pack not in ("auto", "smallest", True, False):
            raise ConfigError(f"Export.pack: got {self.pack!r}; auto, true or false is needed, or smallest")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How the two files are timed.

    Attributes:
        threads: intra-op threads of ONNX Runtime.
        repeats: interleaved rounds.
    """

    threads: int = 1
    repeats: int = 30

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("repeats", 3)):
            if getattr(self, name) < least:
                raise ConfigError(f"Benchmark.{name}: got {getattr(self, name)}; at least {least} is needed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run.

    Attributes:
        model: the network.
        data: the samples.
        stages: what is done to it, in order.
        export: how it is written.
        benchmark: how it is timed.
        seed: of initial weights, order and augmentation.
    """

    model: ReferenceModel | ImportedModel
    data: Digits | FashionMnist | SpokenDigits | ImageFolder | ImportedData
    stages: Sequence[Stage]
    export: Export = field(default_factory=Export)
    benchmark: Benchmark = field(default_factory=Benchmark)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages: the list is empty; at least one stage is needed, such as {train: {epochs: 10}}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed: got {self.seed}; a number between 0 and 2147483647 is needed")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A recipe, its file's name, and the plain data and text that it was made from (with overrides), as a run folder keeps it."""

    recipe: Recipe
    name: str
    plain: dict[str, Any]
    text: str


def load(path: str | FilePath, overrides: Iterable[str] = ()) -> Loaded:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: "key.path=value"; numbers index lists; a key of stages ("train.epochs=1") is set in every stage that has it.

    Raises:
        FileError: no such file, or not readable.
        ConfigError: not YAML, an unknown key, a value out of range; with file, line and key path.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FileError(f"{path}: cannot be read ({reason}); the path of a recipe (YAML) is needed") from error
    return parse(text, overrides, name=str(path))


def parse(text: str, overrides: Iterable[str] = (), *, name: str = "recipe") -> Loaded:
    """Read a recipe from YAML text.

    Example:
        >>> found = parse('''
        ... model: {kind: resnet8, classes: 10}
        ... data: {kind: digits}
        ... stages: [{train: {epochs: 20}}]
        ... ''', ["train.epochs=1"])
        >>> found.recipe.stages[0].train.epochs
        1
    """
    plain, lines = read_yaml(text, name)
    if not isinstance(plain, dict):
        keys = ", ".join(f.name for f in dataclasses.fields(Recipe))
        raise ConfigError(f"{name}: holds no keys and values; a recipe has {keys}")
    overrides = list(overrides)
    for override in overrides:
        _override(plain, override)
    try:
        recipe = strict.build(Recipe, plain)
    except strict.KeyPathError as error:
        raise ConfigError(f"{name}:{line_of(lines, error.path)}: {error}") from error
    if overrides:
        text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
    return Loaded(recipe=recipe, name=FilePath(name).name, plain=plain, text=text)


def first_difference(a: object, b: object, path: Path = ()) -> str | None:
    """Name the first key path at which two plain recipes differ, or None.

    Example:
        >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
        'a.b'
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                return strict.dotted((*path, key))
            found = first_difference(a[key], b[key], (*path, key))
            if found:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := first_difference(x, y, (*path, i)))), None)
    return None if a == b else strict.dotted(path)


def _override(plain: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: 'key.path=value' is needed, such as train.epochs=1")
    try:
        parsed, _ = read_yaml(value, "--set")  # as in the file: 2:4 is a pattern, no number of base 60
    except ConfigError as error:
        raise ConfigError(f"--set {override}: the value is not YAML; a number, text, or {{key: value}} is needed") from error
    parts = key.strip().split(".")
    places: list[Any] = [plain]
    stage_keys = {f.name for f in dataclasses.fields(Stage)}
    top = {f.name for f in dataclasses.fields(Recipe)}
    if parts[0] not in top | stage_keys:
        raise ConfigError(f"--set {override}: unknown key {parts[0]!r}{nearest(parts[0], top | stage_keys)}")
    if parts[0] in stage_keys:
        stages = plain.get("stages")
        places = [s for s in stages if isinstance(s, dict) and parts[0] in s] if isinstance(stages, list) else []
        if not places:
            raise ConfigError(f"--set {override}: no stage has {parts[0]!r}; name one, such as stages.0.{key}")
    for place in places:
        put(place, parts, parsed, where=f"--set {override}")
