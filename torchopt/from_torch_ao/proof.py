"""Each value of the rewritten network beside torch.ao's, computed from torch.ao's own inputs, so that no difference adds up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torchopt.errors import ModelError
from torchopt.from_torch_ao.rewrite import Steps

FLOAT = 1e-4  # of the largest value, between floats


def prove(ours: fx.GraphModule, steps: Steps, seen: Mapping[str, Any], inputs: tuple[Any, ...]) -> None:
    """Refuse a network of which some value is more than one step from torch.ao's.

    Args:
        ours: the rewritten network.
        steps: of its nodes that are compared; 0 between floats.
        seen: what each of torch.ao's nodes gives for `inputs`.
        inputs: the tensors of one call.

    Raises:
        ModelError: says which value, and how far.
    """
    _Forced(ours, {name: _float(value) for name, value in seen.items()}, steps).run(*inputs)


class _Forced(fx.Interpreter):
    """Runs our graph; where a node stands for one of theirs, theirs is what the next node reads."""

    def __init__(self, graph: fx.GraphModule, known: dict[str, Any], steps: Steps) -> None:
        super().__init__(graph)
        self.known, self.steps = known, steps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        right = self.known.get(n.name.removeprefix("round_"))
        if n.name not in self.steps or not isinstance(right, torch.Tensor) or not isinstance(value, torch.Tensor):
            return value
        self._compare(n.name.removeprefix("round_"), value, right, self.steps[n.name])
        return right

    def _compare(self, name: str, ours: torch.Tensor, theirs: torch.Tensor, step: float) -> None:
        if ours.shape != theirs.shape:
            raise ModelError(
                f"from_torch_ao: {name} has the shape {tuple(ours.shape)} here and {tuple(theirs.shape)} in torch.ao"
            )
        if not ours.numel() or not theirs.is_floating_point():
            return
        apart = float((ours - theirs).abs().max())
        allowed = 1.001 * step if step else FLOAT * float(theirs.abs().max().clamp(min=1e-6))
        if apart > allowed:
            unit = f"{apart / step:.1f} steps" if step else f"{apart:.3g}"
            raise ModelError(
                f"from_torch_ao: {name} is {unit} from what torch.ao computes from the same values, and one step is allowed; quantize the "
                "float network with torchopt.prepare"
            )


def _float(value: Any) -> Any:
    return value.dequantize() if isinstance(value, torch.Tensor) and value.is_quantized else value
