"""Proof that the file is the model: weights bit for bit, outputs in quantization steps, predictions one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from torchopt.batches import Batch, model_inputs
from torchopt.errors import DataError
from torchopt.export.pack import decode_initializers
from torchopt.progress import track
from torchopt.runtime.layers import layer_differences
from torchopt.runtime.session import session
from torchopt.weights import weights


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a file compares with the model that it was exported from.

    Attributes:
        weights_equal: every weight that the file names decodes to the torch tensor bit for bit.
        first_difference: the first weight that does not, or None.
        weights_compared: how many were found in both.
        max_abs: largest difference of an output.
        max_relative: the same, over the largest output.
        step: 1/255 of the range of the outputs, the step of an 8-bit grid over them, or None for a float model.
        max_steps: largest difference in steps, or None for a float model.
        within_one_step: share of output entries that differ by one step at most, or None.
        top1_agreement: share of samples whose largest output is the same.
        samples: how many were compared.
        layers_compared: how many layers' outputs were compared, on request.
        first_layer: the first layer, in the file's order, whose output is further apart than the tolerance, or None.
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        equal = f"{self.weights_compared} weights bit-equal" if self.weights_equal else f"{self.first_difference} DIFFERS"
        steps = f", at most {self.max_steps:.2f} quantization steps apart" if self.max_steps is not None else ""
        return (
            f"{equal}; outputs at most {self.max_abs:.3g} apart ({self.max_relative:.2g} of the largest){steps}; "
            f"top-1 agreement {self.top1_agreement:.2%} of {self.samples} samples{self._layers()}"
        )

    def _layers(self) -> str:
        if not self.layers_compared:
            return ""
        first = f"the first to differ is {self.first_layer}" if self.first_layer is not None else "none differs"
        return f"; of {self.layers_compared} layers {first}"


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
        DataError: no batch, one that lacks an input of the file, or NaN in the outputs.
        FileError: the file is missing, damaged, or refused.
    """
    compared, different = compare_weights(model, path)
    opened = session(path)
    training = model.training
    model.eval()
    first: list[Batch] = []
    kept = _keep_first(track(batches, "verify", enabled=progress), first)
    pairs = [_outputs(model, opened, batch) for batch in kept]
    model.train(training)
    if not pairs:
        raise DataError("verify: the loader gave no batch; give at least one")
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise DataError("verify: an output is NaN or infinite; give finite inputs")
    verdict = _verdict(ours, theirs, compared, different, output_step(model, ours))
    if not layers:
        return verdict
    limit = tolerance if tolerance is not None else 1e-3 if verdict.step is None else 2 / 255
    found = layer_differences(model, path, first[0])
    return replace(
        verdict, layers_compared=len(found), first_layer=next((d.layer for d in found if not d.relative <= limit), None)
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


def output_step(model: nn.Module, outputs: np.ndarray) -> float | None:
    """Return the quantization step of a quantized model's outputs: their range in 255 steps; None for a float model.

    The last layer's outputs are float: an 8-bit grid over their range is what they would be rounded to.
    """
    quantized = any(type(m).__name__ in ("FixedQuantize", "DynamicLinear") for m in model.modules())
    span = float(outputs.max() - outputs.min())
    return span / 255 if quantized and span > 0 else None


@torch.no_grad()
def _outputs(model: nn.Module, opened: onnxruntime.InferenceSession, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    args, kwargs = model_inputs(model, batch)
    ours = model(*args, **kwargs)
    types = {spec.name: spec.type for spec in opened.get_inputs()}
    feed = dict(zip(types, args, strict=False)) | {k: v for k, v in kwargs.items() if k in types}
    missing = [name for name in types if name not in feed]
    if missing:  # arguments with a default, which a tuple leaves to the labels
        raise DataError(
            f"verify: the file was exported with {', '.join(missing)}, which a batch does not give; give each batch as a dict of the "
            "arguments that it was exported with"
        )
    theirs = opened.run(None, {k: _fed(v, types[k]) for k, v in feed.items()})[0]
    first = ours if isinstance(ours, torch.Tensor) else next(iter(ours.values() if isinstance(ours, dict) else ours))
    return first.detach().cpu().float().numpy(), np.asarray(theirs, dtype=np.float32)


def _fed(value: torch.Tensor, wanted: str) -> np.ndarray:
    """An input as the file takes it: float32 where the model computes in another precision."""
    return (value.detach().cpu().float() if wanted == "tensor(float)" else value.detach().cpu()).numpy()


def _verdict(ours: np.ndarray, theirs: np.ndarray, compared: int, different: str | None, step: float | None) -> Verdict:
    apart = np.abs(ours - theirs)
    flat_ours, flat_theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    return Verdict(
        weights_equal=different is None,
        first_difference=different,
        weights_compared=compared,
        max_abs=float(apart.max()),
        max_relative=float(apart.max() / max(float(np.abs(ours).max()), 1e-30)),
        step=step,
        max_steps=None if step is None else float(apart.max() / step),
        within_one_step=None if step is None else float((apart <= 1.001 * step).mean()),
        top1_agreement=float((flat_ours.argmax(1) == flat_theirs.argmax(1)).mean()),
        samples=len(ours),
    )
