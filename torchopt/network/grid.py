"""The integer grid of a baked weight: ŵ = s · q with q an integer, recorded beside the weight so that export can write q.

Finalizing a quantized model leaves ordinary float32 Parameters whose values lie exactly on a grid. Which grid is kept on the
owning module: the buffer `<param>_grid_scale` (so that `state_dict` carries it) and the attributes bits, axis and block. Reading is
strict: the values must satisfy ŵ = s·q bit for bit in float32 arithmetic, as DequantizeLinear computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from torchopt.errors import StateError
from torchopt.state.marks import mark, marked

SUFFIX = "_grid_scale"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The grid of one weight: `scale` float32 of shape () or (channels,), `bits` 2…8, `axis` of the channels or None.

    With a `block`, consecutive inputs of a weight (outputs, inputs) share a scale, `block` each: scale has shape (outputs, blocks).
    """

    name: str
    scale: torch.Tensor
    bits: int
    axis: int | None
    block: int | None = None

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        """Return the int8 codes q of `value` = s·q.

        Raises:
            StateError: some value is off the grid.
        """
        scale = self.broadcast(value.dim())
        q = torch.round(value / scale)
        if not torch.equal(q * scale, value) or q.abs().max() > 2 ** (self.bits - 1):
            off = int((q * scale != value).sum())
            raise StateError(
                f"{self.name}: {off} of {value.numel()} values are not on the {self.bits}-bit grid; "
                "finalize the model again after changing its weights"
            )
        return q.to(torch.int8)

    def broadcast(self, rank: int) -> torch.Tensor:
        """Return the scale in a shape that multiplies a weight of `rank` dimensions."""
        if self.block is not None:
            return self.scale.repeat_interleave(self.block, 1)
        if self.axis is None:
            return self.scale
        shape = [1] * rank
        shape[self.axis] = -1
        return self.scale.reshape(shape)


def set_grid(module: nn.Module, param: str, scale: torch.Tensor, bits: int, axis: int | None, block: int | None = None) -> None:
    """Record the grid of `module.<param>`.

    Args:
        module: the owner of the weight.
        param: the weight's attribute name.
        scale: float32, shape () with `axis=None`, else (channels,), or (outputs, blocks) with a `block`.
        bits: 2 … 8.
        axis: the axis of the weight that `scale` runs along.
        block: inputs that share a scale, in a weight (outputs, inputs); None is one scale a channel.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.5, -1.0]])
        >>> set_grid(layer, "weight", torch.tensor(0.5), 8, None)
        >>> grids(layer)["weight"].codes(layer.weight).tolist()
        [[1, -2]]
    """
    module.register_buffer(param + SUFFIX, scale.detach().to(torch.float32).clone())
    mark(module, f"_{param}_grid", (bits, axis, block))


def grids(model: nn.Module) -> dict[str, Grid]:
    """Return the grid of every weight that has one, by parameter name."""
    found = {}
    for prefix, module in model.named_modules():
        for buffer, scale in module._buffers.items():
            param = buffer.removesuffix(SUFFIX)
            known = marked(module, f"_{param}_grid") if buffer.endswith(SUFFIX) else None
            if scale is not None and known is not None:
                bits, axis, block = known
                name = f"{prefix}.{param}" if prefix else param
                found[name] = Grid(name=name, scale=scale, bits=bits, axis=axis, block=block)
    return found
