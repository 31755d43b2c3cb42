"""A choice for all layers, made and measured: the network, its noise, its score, and its file to the byte.

What the table of single layers predicts is not what a person gets. So each point that a search considers is composed for real: one call
of `one_shot`, one export, one score. The points are kept in a journal by their rules, so that a killed search goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchopt.compress.one_shot import one_shot
from torchopt.compress.verbs import finalize, prepare
from torchopt.export import export
from torchopt.network.weights import Weight, find_weight
from torchopt.rules import Rule
from torchopt.runtime import benchmark
from torchopt.search.choices import Option
from torchopt.search.layers.journal import Journal, digest
from torchopt.search.layers.samples import Samples, loss, outputs

REPEATS = 20
Chosen = Mapping[str, Option]
Train = Callable[[nn.Module, float], object]


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One choice, measured.

    Attributes:
        chosen: the option of each weight.
        rules: the same as rules.
        bytes: of the packed file.
        score: in the units of `evaluate`, or the agreement with float.
        loss: noise over signal at the outputs.
        latency_ms: of the file in ONNX Runtime; None where that was not asked for.
        predicted_bytes: what the file was expected to be; None for the first points, from which that is learned.
        predicted_ms: the same of the latency.
    """

    chosen: dict[str, Option]
    rules: list[Rule]
    bytes: int
    score: float
    loss: float
    latency_ms: float | None = None
    predicted_bytes: float | None = None
    predicted_ms: float | None = None


class Composer:
    """Makes points.

    Args:
        plain: the float network.
        samples: that teach and judge.
        example: one call's arguments.
        score: of a network.
        target: as for `export`.
        mode: of `Quantize`.
        journal: of points that were made before.
        timed: measure latency too.
        train: fine-tunes a prepared network in place, for a share of its full course.
        share: that share.
    """

    def __init__(
        self,
        plain: nn.Module,
        samples: Samples,
        example: tuple[Any, ...] | None,
        score: Callable[[nn.Module], float],
        *,
        target: str,
        mode: str,
        journal: Journal,
        timed: bool = False,
        train: Train | None = None,
        share: float = 1.0,
    ) -> None:
        self.plain, self.samples, self.example, self.score, self.target, self.mode = plain, samples, example, score, target, mode
        self.journal, self.timed, self.train, self.share = journal, timed, train, share
        self._last: tuple[str, nn.Module] | None = None

    def rules(self, chosen: Chosen) -> list[Rule]:
        """The rules that make a choice."""
        listed: list[tuple[Weight | None, Option]] = [(find_weight(self.plain, name), option) for name, option in chosen.items()]
        return [option.rule(weight, self.mode, trains=self.train is not None) for weight, option in listed if weight is not None]

    def network(self, chosen: Chosen) -> nn.Module:
        """The compressed network, plain."""
        key = self._key(chosen)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        rules, batches = self.rules(chosen), self.samples.batches()
        if all(rule.quantize is None for rule in rules):
            return self.plain
        common = {"example_inputs": self.example, "target": self.target}
        if self.train is None:
            made = one_shot(self.plain, rules, batches, progress=False, **common)  # type: ignore[arg-type]
        else:
            ready = prepare(self.plain, rules, self.example, target=self.target)
            self.train(ready, self.share)
            made = finalize(ready, unfinished=True)
        self._last = (key, made.eval())
        return made

    def point(self, chosen: Chosen, expected: tuple[float | None, float | None] = (None, None)) -> Point:
        """Make a choice and measure it, or recall it.

        Args:
            chosen: an option for each weight.
            expected: the bytes and the milliseconds that were predicted.
        """
        key = self._key(chosen)
        known = self.journal.get(key)
        if known is None:
            known = self._measured(self.network(chosen))
            self.journal.put(key, known)
        return Point(
            chosen=dict(chosen),
            rules=self.rules(chosen),
            bytes=int(known["bytes"]),
            score=float(known["score"]),
            loss=float(known["loss"]),
            latency_ms=known["latency_ms"],
            predicted_bytes=expected[0],
            predicted_ms=expected[1],
        )

    def _measured(self, network: nn.Module) -> dict[str, Any]:
        noise = loss(outputs(network, self.samples.judge), self.samples.wanted)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "model.onnx"
            size = export(network, self.example or (), path, target=self.target).size_bytes
            time = benchmark([path], repeats=REPEATS, progress=False).rows[0].latency_ms if self.timed else None
        return {"bytes": size, "loss": noise, "score": self.score(network), "latency_ms": time}

    def _key(self, chosen: Chosen) -> str:
        options = sorted((name, str(option)) for name, option in chosen.items())
        return digest(options, self.mode, self.target, self.timed, None if self.train is None else self.share)
