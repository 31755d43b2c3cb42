"""Proof that the file is the model: weights bit for bit, all outputs in quantization steps, predictions one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from torchopt.errors import DataError
from torchopt.io.progress import track
from torchopt.network.batches import Batch, each, model_inputs
from torchopt.network.surgery import evaluating
from torchopt.network.weights import weights
from torchopt.pack.pack import decode_initializers
from torchopt.process.ordinary import alone
from torchopt.runtime.feed import feed_of_batch
from torchopt.runtime.inputs import first_line, run
from torchopt.runtime.layers import layer_differences
from torchopt.runtime.outputs import Gathered, OutputVerdict, Pair, flat, pairs
from torchopt.runtime.session import session


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a file compares with the model that it was exported from.

    Attributes:
        weights_equal: every weight that the file names decodes to the torch tensor bit for bit.
        first_difference: the first weight that does not, or None.
        weights_compared: how many were found in both.
        max_abs: largest difference in any output.
        max_relative: the same, over the largest entry of its output.
        step: 1/255 of the range of an output, the step of an 8-bit grid over it, or None for a float model; of the output that is
            the furthest apart in steps.
        max_steps: largest difference in steps in any output, or None for a float model.
        within_one_step: share of entries that differ by one step at most, in the output where it is smallest, or None.
        top1_agreement: share of samples whose largest entry of the first output is the same.
        samples: how many were compared.
        layers_compared: how many layers' outputs were compared, on request.
        first_layer: the first layer, in the file's order, whose output is further apart than the tolerance, or None.
        outputs: each output by itself.
    """

    weights_equal: bool
    first_difference: str | None
    weights_compared: int
    max_abs: float
    max_relative: float
    step: float | None
    max_steps: float | None
    within_one_step: float | None
    top1_agreement: float
    samples: int
    layers_compared: int = 0
    first_layer: str | None = None
    outputs: tuple[OutputVerdict, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        named = (
            f"{self.weights_compared} weights bit-equal"
            if self.weights_compared
            else "no weight of the model is named in the file"
        )
        equal = named if self.weights_equal else f"{self.first_difference} DIFFERS"
        steps = f", at most {self.max_steps:.2f} quantization steps apart" if self.max_steps is not None else ""
        return (
            f"{equal}; outputs at most {self.max_abs:.3g} apart ({self.max_relative:.2g} of the largest){steps}; "
            f"top-1 agreement {self.top1_agreement:.2%} of {self.samples} samples{self._outputs()}{self._layers()}"
        )

    def _outputs(self) -> str:
        if len(self.outputs) < 2:
            return ""
        worst = max(self.outputs, key=lambda o: (o.max_steps or 0.0, o.max_relative))
        return (
            f"; of {len(self.outputs)} outputs {worst.name} is the furthest apart"
            if worst.max_abs
            else f"; {len(self.outputs)} outputs"
        )

    def _layers(self) -> str:
        if not self.layers_compared:
            return ""
        first = f"the first to differ is {self.first_layer}" if self.first_layer is not None else "none differs"
        return f"; of {self.layers_compared} layers {first}"


@alone()
def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Batch],
    *,
    progress: bool = True,
    layers: bool = False,
    tolerance: float | None = None,
) -> Verdict:
    """Compare a finalized torch model with the ONNX file that was exported from it.

    Args:
        model: what was exported.
        path: the file.
        batches: inputs (labels are ignored); the outputs of both are compared on them.
        progress: show a bar on stderr.
        layers: also compare each layer's output on the first batch, and name the first that differs.
        tolerance: of a layer, as a share of its largest output; by default 0.001, or 2/255 where the model is quantized.

    Raises:
        DataError: no batch, one that lacks an input of the file or does not fit it, outputs that are not the model's in number or
            shape, or NaN in them.
        FileError: the file is missing, damaged, or refused.
    """
    compared, different = compare_weights(model, path)
    opened = session(path)
    first: list[Batch] = []
    kept = _keep_first(track(each(batches), "verify", enabled=progress), first)
    with evaluating(model), torch.no_grad():
        outputs, agreeing, samples = _compared(model, opened, kept, str(path))
    if not outputs:
        raise DataError("verify: the loader gave no batch; give at least one")
    quantized = any(type(m).__name__ in ("FixedQuantize", "DynamicLinear") for m in model.modules())
    found = tuple(output.verdict(quantized) for output in outputs)
    verdict = _verdict(found, compared, different, agreeing / max(samples, 1), samples)
    if not layers:
        return verdict
    limit = tolerance if tolerance is not None else 1e-3 if verdict.step is None else 2 / 255
    apart = layer_differences(model, path, first[0])
    return replace(
        verdict, layers_compared=len(apart), first_layer=next((d.layer for d in apart if not d.relative <= limit), None)
    )


def _keep_first(batches: Iterable[Batch], first: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        first += [] if first else [batch]
        yield batch


def compare_weights(model: nn.Module, path: str | os.PathLike[str]) -> tuple[int, str | None]:
    """Return how many weights of the model the file names, and the first whose value is not bit-equal, or None."""
    stored = decode_initializers(path)
    compared = 0
    for weight in weights(model):
        name = next((n for n in (weight.name, *weight.aliases) if n in stored), None)
        if name is not None:
            compared += 1
            value, theirs = weight.value.detach().cpu(), stored[name]
            if value.dtype in (
                torch.bfloat16,
                torch.float16,
            ):  # files hold such values as float16 or float32, whichever is smaller
                value, theirs = value.float(), theirs.astype(np.float32)
            ours = value.numpy()
            if ours.dtype != theirs.dtype or ours.tobytes() != np.ascontiguousarray(theirs).tobytes():
                return compared, weight.name
    return compared, None


def _compared(
    model: nn.Module, opened: onnxruntime.InferenceSession, batches: Iterable[Batch], where: str
) -> tuple[list[Gathered], int, int]:
    """All outputs over all batches; of the first, how many samples have the same largest entry, and how many there are."""
    gathered: list[Gathered] = []
    agreeing = samples = 0
    for batch in batches:
        theirs = run(opened, feed_of_batch(model, opened, batch, where), where)  # first: a model may change its inputs
        found = pairs(_by_torch(model, batch), theirs, opened, where)
        gathered = gathered or [Gathered.of(pair) for pair in found]
        for output, pair in zip(gathered, found, strict=True):
            output.ours.append(flat(pair.ours))
            output.theirs.append(flat(pair.theirs))
        same, count = _top1(found[0]) if found else (0, 0)
        agreeing, samples = agreeing + same, samples + count
    return gathered, agreeing, samples


def _by_torch(model: nn.Module, batch: Batch) -> Any:
    args, kwargs = model_inputs(model, batch)
    try:
        return model(*args, **kwargs)
    except Exception as error:  # the model's code raises what it likes
        raise DataError(f"verify: {type(model).__name__} does not take a batch: {first_line(error)}") from error


def _top1(pair: Pair) -> tuple[int, int]:
    """How many samples have the same largest entry, and how many there are."""
    count = len(pair.ours) if pair.ours.dim() else 1
    if not pair.ours.numel():
        return count, count
    ours, theirs = (flat(side).reshape(count, -1).argmax(1) for side in (pair.ours, pair.theirs))
    return int((ours == theirs).sum()), count


def _verdict(outputs: tuple[OutputVerdict, ...], compared: int, different: str | None, agreement: float, samples: int) -> Verdict:
    worst = max((o for o in outputs if o.max_steps is not None), key=lambda o: o.max_steps or 0.0, default=None)
    shares = [o.within_one_step for o in outputs if o.within_one_step is not None]
    return Verdict(
        weights_equal=different is None,
        first_difference=different,
        weights_compared=compared,
        max_abs=max(o.max_abs for o in outputs),
        max_relative=max(o.max_relative for o in outputs),
        step=None if worst is None else worst.step,
        max_steps=None if worst is None else worst.max_steps,
        within_one_step=min(shares, default=None),
        top1_agreement=agreement,
        samples=samples,
        outputs=outputs,
    )
