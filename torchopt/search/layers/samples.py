"""The samples: some teach the solver, others judge; and two ways to say how like the float network another is.

The loss is the mean square of what the outputs lack, over their variance: noise over signal. It adds up over layers, nearly, which is what
a search over layers needs. The agreement is what a person asks for where there are no labels: the share of answers that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import DataError
from torchopt.network.batches import Batch, each, model_inputs
from torchopt.quantize.calibration.batch_slices import Call, kept, part, samples_of

LEARN = 128  # samples that the solver learns from
JUDGE = 64  # samples at whose outputs a layer's options are compared
PIECE = 16


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The calls that teach, as batches too, those that judge, and the float network's outputs on the latter."""

    learn: list[Call]
    judge: list[Call]
    wanted: list[list[Tensor]]

    def batches(self) -> list[Any]:
        """The samples that teach, as `one_shot` takes batches."""
        return [kwargs if kwargs else args for args, kwargs in self.learn]

    def first(self, count: int) -> Samples:
        """The same with fewer samples that judge."""
        judge = kept(self.judge, count)
        lengths = [samples_of(call) for call in judge]
        cut = [[t[:n] if t.dim() else t for t in outputs] for outputs, n in zip(self.wanted, lengths, strict=False)]
        return Samples(learn=self.learn, judge=judge, wanted=cut)

    @property
    def judges(self) -> int:
        """How many samples judge."""
        return sum(samples_of(call) for call in self.judge)


def split(model: nn.Module, batches: Iterable[Batch], example_inputs: tuple[Any, ...] | None) -> Samples:
    """Share samples out: every second piece teaches, the others judge; a single sample does both.

    Raises:
        DataError: there is none, or the outputs hold no numbers, NaN, or one value only.

    Example:
        >>> found = split(nn.ReLU(), torch.randn(40, 3), None)
        >>> [len(args[0]) for args, _ in found.learn], found.judges
        ([16, 8], 16)
    """
    calls = [model_inputs(model, batch, example_inputs) for batch in each(batches)]
    total = sum(samples_of(call) for call in calls)
    if not total:
        raise DataError("batches: hold no sample; a few hundred are plenty")
    size = max(1, min(PIECE, total // 2))
    pieces = [part(call, at, min(at + size, n)) for call in calls if (n := samples_of(call)) for at in range(0, n, size)]
    learn, judge = pieces[::2], pieces[1::2] or pieces
    wanted = outputs(model, judge)
    flat = [torch.cat([one[i].reshape(-1).double() for one in wanted]) for i in range(len(wanted[0]))]
    if not flat or not all(bool(torch.isfinite(x).all()) for x in flat):
        raise DataError(
            "batches: the network's outputs on them hold no numbers, or NaN or infinity; a network that works is needed"
        )
    if size < total and all(torch.equal(t[:1].expand_as(t), t) and torch.equal(t[:1], first[:1]) for t, first in _firsts(wanted)):
        raise DataError("batches: the network's outputs for all samples are equal; samples that differ are needed")
    return Samples(learn=learn, judge=judge, wanted=wanted)


def _firsts(wanted: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Each output of each call, with the same output of the first call."""
    return [
        (t, first)
        for one in wanted
        for t, first in zip(one, wanted[0], strict=False)
        if t.dim() and t.shape[1:] == first.shape[1:]
    ]


@torch.no_grad()
def outputs(model: nn.Module, calls: Sequence[Call]) -> list[list[Tensor]]:
    """The floating outputs of each call, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        found = [tree_leaves(model(*args, **kwargs)) for args, kwargs in calls]
    finally:
        model.train(training)
    return [[t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()] for leaves in found]


def loss(given: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> float:
    """Return noise over signal, the mean over the outputs; infinity where something is not finite.

    Example:
        >>> loss([[torch.tensor([1.0, 3.0])]], [[torch.tensor([1.0, 2.0])]])
        1.0
    """
    ratios = []
    for i in range(len(wanted[0])):
        want = torch.cat([one[i].reshape(-1).double() for one in wanted])
        have = torch.cat([one[i].reshape(-1).double() for one in given])
        signal = float(want.var()) if want.numel() > 1 else float(want.square().mean())
        if signal > 0:
            ratios.append(float((have - want).square().mean()) / signal)
    value = sum(ratios) / max(1, len(ratios))
    return value if value == value else float("inf")


def agreement(given: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> float:
    """Return the share of answers that are the same: the largest along axis 1; of outputs without one, 1 − noise over signal.

    Example:
        >>> agreement([[torch.tensor([[0.1, 0.9], [0.8, 0.2]])]], [[torch.tensor([[0.4, 0.6], [0.3, 0.7]])]])
        0.5
    """
    same = total = 0
    for have, want in zip(given, wanted, strict=True):
        if not want or want[0].dim() < 2 or want[0].shape[1] < 2:
            return 1.0 - loss(given, wanted)
        answers = have[0].argmax(1) == want[0].argmax(1)
        same, total = same + int(answers.sum()), total + answers.numel()
    return same / total
