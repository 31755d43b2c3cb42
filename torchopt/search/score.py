"""The user's score, and how far it can be trusted: what it gives twice for one network is looked at before anything is decided by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from torchopt.errors import DataError
from torchopt.network.copies import copied
from torchopt.network.weights import weights
from torchopt.search.layers.samples import Samples, agreement, outputs
from torchopt.search.sensitivity import score_of

MOST = 9  # calls of a noisy evaluate for one network


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of networks.

    Attributes:
        once: one call of it.
        repeats: how many calls are averaged.
        reference: of the float network.
        spread: the standard deviation of one call; 0 for a score that repeats itself.
        units: what it is called.
    """

    once: Callable[[nn.Module], float]
    repeats: int
    reference: float
    spread: float
    units: str

    def __call__(self, model: nn.Module) -> float:
        """The mean of as many calls as the noise needs."""
        return statistics.fmean(self.once(model) for _ in range(self.repeats))


def scored(plain: nn.Module, evaluate: Callable[[nn.Module], float] | None, samples: Samples, max_drop: float | None) -> Score:
    """Return the score, its value for the float network, and its noise.

    Raises:
        DataError: no finite number; noise that hides `max_drop`; or too few samples to tell agreement by.
    """
    if evaluate is None:
        _check_samples(samples, max_drop)
        return Score(
            once=lambda model: agreement(outputs(model, samples.judge), samples.wanted),
            repeats=1,
            reference=1.0,
            spread=0.0,
            units="agreement with float",
        )

    def once(model: nn.Module) -> float:
        return score_of(evaluate, model)

    found = [once(plain), once(plain)]
    if found[0] == found[1]:
        _check_direction(plain, once, found[0], 0.0)
        return Score(once=once, repeats=1, reference=found[0], spread=0.0, units="score")
    found += [once(plain) for _ in range(MOST - 2)]
    spread = statistics.stdev(found)
    _check_direction(plain, once, statistics.fmean(found), 3 * spread)
    needed = MOST if not max_drop else math.ceil((2 * spread / max_drop) ** 2)
    if max_drop is not None and needed > MOST:
        raise DataError(
            f"evaluate: gives {min(found):.6g} to {max(found):.6g} for the same network; a drop of {max_drop:g} cannot be told from that; "
            "fix its seed, score more samples, or allow more"
        )
    return Score(once=once, repeats=max(2, needed), reference=statistics.fmean(found), spread=spread, units="score")


@torch.no_grad()
def _check_direction(plain: nn.Module, once: Callable[[nn.Module], float], reference: float, noise: float) -> None:
    """Refuse a score that is better for a ruined network: the same one with the weights of each layer shuffled.

    Raises:
        DataError: lower seems to be better.
    """
    ruined, generator = copied(plain).eval(), torch.Generator().manual_seed(0)
    for weight in weights(ruined):
        values = weight.trainable.reshape(-1)
        weight.trainable.copy_(
            values[torch.randperm(values.numel(), generator=generator).to(values.device)].reshape(weight.value.shape)
        )
    try:
        given = once(ruined)
    except DataError:
        return  # no finite number: worse than any
    if given > reference + noise:
        raise DataError(
            f"evaluate: gives {given:.6g} for the network with its weights shuffled and {reference:.6g} for the network itself; "
            "higher must be better: return the accuracy, or the negative of a loss"
        )


def _check_samples(samples: Samples, max_drop: float | None) -> None:
    """Refuse an agreement that is too coarse for the drop asked for.

    Raises:
        DataError: it is.
    """
    count = samples.judges
    told = sum(one[0].argmax(1).numel() for one in samples.wanted if one and one[0].dim() > 1 and one[0].shape[1] > 1)
    if told and max_drop and max_drop * told < 1 - 1e-9:
        raise DataError(
            f"batches: {count} samples are held back, which tell agreement to {1 / told:.3g}; max_drop={max_drop:g} needs "
            f"{math.ceil(2 * count / (max_drop * told))} samples in all, or evaluate=, a score on data of your own"
        )
