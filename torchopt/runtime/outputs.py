"""Each output of a file beside the same output of its model: name, shape, type, and how far apart the values are.

A model may return a tensor, or any nesting of tuples, lists, dicts and dataclasses: its tensors in that order are the file's outputs.
Where the keys of a dict are the file's names, these decide. An infinity in the same place on both sides, as in a mask, is no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.utils._pytree import MappingKey, SequenceKey, keystr, tree_flatten_with_path

from torchopt.errors import DataError
from torchopt.network.structure import containers
from torchopt.runtime.inputs import TYPES


@dataclass(frozen=True, kw_only=True)
class OutputVerdict:
    """One output.

    Attributes:
        name: in the file.
        key: in what the model returns: "logits", "1", or "" where that is one tensor.
        shape: of the first batch.
        dtype: in the file.
        model_dtype: in torch.
        max_abs: largest difference.
        max_relative: the same, over the largest entry of this output.
        step: 1/255 of this output's range, or None where it or the model is not quantized.
        max_steps: largest difference in steps, or None.
        within_one_step: share of entries that differ by one step at most, or None.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    model_dtype: str
    max_abs: float
    max_relative: float
    step: float | None
    max_steps: float | None
    within_one_step: float | None


@dataclass(kw_only=True)
class Gathered:
    """One output over all batches, flat, both sides."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    model_dtype: str
    ours: list[np.ndarray] = field(default_factory=list)
    theirs: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, pair: Pair) -> Gathered:
        """Begin with the first batch's."""
        kind = str(pair.ours.dtype).removeprefix("torch.")
        return cls(name=pair.name, key=pair.key, shape=tuple(pair.ours.shape), dtype=pair.dtype, model_dtype=kind)

    def verdict(self, quantized: bool) -> OutputVerdict:
        """Compare them.

        Raises:
            DataError: a value is NaN, or infinite on one side.
        """
        ours, theirs = np.concatenate(self.ours), np.concatenate(self.theirs)
        same = np.isinf(ours) & (ours == theirs)
        for side, values in (("torch", ours), ("the file", theirs)):
            bad = int((~np.isfinite(values) & ~same).sum())
            if bad:
                raise DataError(
                    f"verify: an output is NaN or infinite: {self.name}, in {bad} of {values.size} entries in {side}; give finite inputs"
                )
        ours, theirs = ours[~same], theirs[~same]
        apart = np.abs(ours - theirs) if ours.size else np.zeros(1, np.float32)
        span = float(ours.max() - ours.min()) if ours.size else 0.0
        step = span / 255 if quantized and span > 0 and self.model_dtype.startswith(("float", "bfloat")) else None
        return OutputVerdict(
            name=self.name,
            key=self.key,
            shape=self.shape,
            dtype=self.dtype,
            model_dtype=self.model_dtype,
            max_abs=float(apart.max()),
            max_relative=float(apart.max() / max(float(np.abs(ours).max(initial=0)), 1e-30)),
            step=step,
            max_steps=None if step is None else float(apart.max() / step),
            within_one_step=None if step is None else float((apart <= 1.001 * step).mean()),
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One output of one batch, both sides as they are."""

    name: str
    key: str
    ours: torch.Tensor
    theirs: np.ndarray
    dtype: str


def pairs(returned: Any, given: list[Any], opened: onnxruntime.InferenceSession, where: str) -> list[Pair]:
    """Return the outputs of a batch, side by side, in the model's order.

    Args:
        returned: by the model.
        given: by the runtime, in the file's order.
        opened: the file.
        where: its name, for messages.

    Raises:
        DataError: their number, or a shape, is not the same.
    """
    ours = [
        (_key(path), leaf) for path, leaf in tree_flatten_with_path(containers(returned))[0] if isinstance(leaf, torch.Tensor)
    ]
    specs = opened.get_outputs()
    if len(ours) != len(specs):
        raise DataError(
            f"verify: {where} gives {len(specs)} outputs ({', '.join(s.name for s in specs)}), and the model {len(ours)} "
            f"({', '.join(key or 'one tensor' for key, _ in ours) or 'no tensor'}); give the model that it was exported from"
        )
    names = [spec.name for spec in specs]
    places = [names.index(key) for key, _ in ours] if {key for key, _ in ours} == set(names) else list(range(len(ours)))
    found = []
    for (key, tensor), place in zip(ours, places, strict=True):
        theirs = _array(given[place])
        if theirs is None or tuple(theirs.shape) != tuple(tensor.shape):
            shape = "no tensor" if theirs is None else f"the shape {tuple(theirs.shape)}"
            raise DataError(
                f"verify: output {names[place]} has {shape} in {where}, and the shape {tuple(tensor.shape)} in torch; give the model "
                "that it was exported from"
            )
        dtype = TYPES[specs[place].type][0]
        found.append(Pair(name=names[place], key=key, ours=tensor.detach().cpu(), theirs=theirs, dtype=dtype))
    return found


def flat(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return numbers as they are compared: one row; float32, or float64 where that holds more."""
    array = (values.float() if values.dtype == torch.bfloat16 else values).numpy() if isinstance(values, torch.Tensor) else values
    exact = (array.dtype.kind in "iu" and array.dtype.itemsize > 2) or array.dtype == np.float64
    return array.astype(np.float64 if exact else np.float32).reshape(-1)


def _key(path: tuple[Any, ...]) -> str:
    if len(path) == 1 and isinstance(path[0], (MappingKey, SequenceKey)):
        return str(path[0].key if isinstance(path[0], MappingKey) else path[0].idx)
    return keystr(path).lstrip(".")


def _array(value: Any) -> np.ndarray | None:
    """A tensor as numpy has it, bfloat16 as float32; None for what is no tensor."""
    if isinstance(value, onnxruntime.OrtValue):
        if not value.is_tensor():
            return None
        if value.data_type() == "tensor(bfloat16)":
            return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).float().numpy()
        return value.numpy()
    return value if isinstance(value, np.ndarray) else None
