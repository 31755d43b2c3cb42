"""One layer under one option, the rest of the network float: what the outputs lose, and what the weight takes in a file.

The layer is compensated as `one_shot` does it, from what it reads in the float network. One walk through that network serves all
options of all layers: at each layer, whatever is asked of it is tried there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt.compress.compensate import compensate_one, held_weights
from torchopt.compress.in_step import in_step
from torchopt.compress.seen import Seen
from torchopt.compress.verbs import finalize, prepare
from torchopt.errors import TorchoptError
from torchopt.network.weights import Weight
from torchopt.quantize.calibration.batch_slices import kept
from torchopt.search.choices import Option
from torchopt.search.layers.samples import LEARN, Samples, loss, outputs
from torchopt.search.layers.sizes import Size, pareto, sizes
from torchopt.solver.positions import readable


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of it.

    Attributes:
        loss: noise over signal at the outputs.
        sizes: the forms that the weight may take in a file.
        reason: why the option cannot be had; empty where it can.
        network: the float network with this one layer changed; None where it came from the cache.
    """

    loss: float
    sizes: list[Size]
    reason: str = ""
    network: nn.Module | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"loss": self.loss, "sizes": [[size.own, size.shared] for size in self.sizes], "reason": self.reason}

    @staticmethod
    def of(found: Mapping[str, Any]) -> Trial:
        """From that again."""
        listed = [Size(own=int(own), shared={str(k): int(v) for k, v in shared.items()}) for own, shared in found["sizes"]]
        return Trial(loss=float(found["loss"]), sizes=listed, reason=str(found["reason"]))


def trials(
    plain: nn.Module, asked: Mapping[Weight, Sequence[Option]], samples: Samples, example: tuple[Any, ...] | None
) -> Iterator[tuple[Weight, Option, Trial]]:
    """Yield each weight and option that is asked for, with what comes of it.

    Args:
        plain: the float network, in evaluation mode.
        asked: options by weight of `plain`.
        samples: to learn from, and to judge by.
        example: one call's arguments.
    """
    by_layer: dict[nn.Module, list[Weight]] = {}
    for weight in asked:
        by_layer.setdefault(weight.module, []).append(weight)
    seen = set[Weight]()
    walked = [layer for layer, owned in by_layer.items() if readable(layer) and any(w.param == "weight" for w in owned)]
    for layer, inputs in in_step(plain, walked, kept(samples.learn, LEARN)):
        known = Seen.of(layer, inputs)
        for weight in by_layer[layer]:
            seen.add(weight)
            for option in asked[weight]:
                yield weight, option, _tried(plain, weight, option, samples, example, known)
    for weight in asked:
        for option in asked[weight] if weight not in seen else ():
            yield weight, option, _tried(plain, weight, option, samples, example, None)


def _tried(
    plain: nn.Module,
    weight: Weight,
    option: Option,
    samples: Samples,
    example: tuple[Any, ...] | None,
    known: Seen | None,
) -> Trial:
    if option.bits is None:
        return Trial(loss=0.0, sizes=sizes(plain, weight.name), network=plain)
    try:
        network = _compressed(plain, weight, option, example, known)
    except TorchoptError as error:
        return Trial(loss=float("inf"), sizes=[], reason=str(error))
    found = loss(outputs(network, samples.judge), samples.wanted)
    return Trial(loss=found, sizes=pareto(sizes(network, weight.name)), network=network)


@torch.no_grad()
def _compressed(
    plain: nn.Module, weight: Weight, option: Option, example: tuple[Any, ...] | None, known: Seen | None
) -> nn.Module:
    """The plain network with one weight under an option."""
    ready = prepare(plain, [option.rule(weight, "weight_only")], example)
    held = held_weights(ready)
    if pruning.finish(ready):
        clustering.refit(ready, {})
    if known is not None and held:
        compensate_one(ready, held[0], known)
    return finalize(ready, unfinished=True).eval()
