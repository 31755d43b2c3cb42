"""What `shrink` did to a network, kept on the result for its report: widths, multiply-adds, and what stayed whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchopt.channels.groups import LAYERS, MATRICES, out_dim
from torchopt.network.weights import Skipped
from torchopt.state.marks import mark, marked

NOTE = "torchopt_shrunken"


@dataclass(frozen=True, kw_only=True)
class Shrunken:
    """A network before and after.

    Attributes:
        widths: for each layer whose outputs became fewer, how many there were and are.
        macs: multiply-adds of one forward call on the example inputs, before and after.
        parameters: how many, before and after.
        kept: the layers that stayed whole, and remembered sizes that stayed as they were, with the reason.
    """

    widths: dict[str, tuple[int, int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    kept: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "macs": list(self.macs),
            "parameters": list(self.parameters),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Shrunken:
        """The inverse of `to_dict`.

        Example:
            >>> Shrunken.from_dict({"widths": {"0": [8, 4]}, "macs": [64, 32], "parameters": [8, 4]}).widths
            {'0': (8, 4)}
        """
        pair = lambda numbers: (int(numbers[0]), int(numbers[1]))  # noqa: E731
        widths = {name: pair(numbers) for name, numbers in fields["widths"].items()}
        return cls(widths=widths, macs=pair(fields["macs"]), parameters=pair(fields["parameters"]))

    def __str__(self) -> str:
        lines = [
            f"shrunken: {self.macs[0]:,} → {self.macs[1]:,} multiply-adds, {self.parameters[0]:,} → {self.parameters[1]:,} parameters"
        ]
        lines += [f"  {name or 'the network'}: {old} → {new} outputs" for name, (old, new) in self.widths.items()]
        return "\n".join(lines)


def shrunken_of(model: nn.Module) -> Shrunken | None:
    """Return what `shrink` did to `model`, or None where it did nothing.

    Example:
        >>> shrunken_of(nn.Linear(2, 1)) is None
        True
    """
    found = marked(model, NOTE)
    return found if isinstance(found, Shrunken) else None


def skipped_of(model: nn.Module) -> list[Skipped]:
    """Return what was kept whole in a shrunken `model`, and why; nothing for another network.

    Example:
        >>> skipped_of(nn.Linear(2, 1))
        []
    """
    found = shrunken_of(model)
    return [] if found is None else list(found.kept)


def take_note(small: nn.Module, whole: nn.Module, macs: tuple[int, int], kept: Sequence[Skipped]) -> None:
    """Write on a smaller network what became of the whole one; what an earlier `shrink` noted is where the numbers begin."""
    earlier = shrunken_of(whole)
    before, after = _widths(whole), _widths(small)
    if earlier is not None:
        before |= {name: old for name, (old, _) in earlier.widths.items() if name in before}
    counts = [sum(p.numel() for p in net.parameters()) for net in (whole, small)]
    note = Shrunken(
        widths={name: (before[name], new) for name, new in after.items() if before.get(name, new) != new},
        macs=macs if earlier is None else (earlier.macs[0], macs[1]),
        parameters=(counts[0] if earlier is None else earlier.parameters[0], counts[1]),
        kept=tuple(kept),
    )
    mark(small, NOTE, note)


def _widths(model: nn.Module) -> dict[str, int]:
    """Outputs of each layer; of attention, the width of all its heads; of a recurrent layer, its hidden units."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            found[name] = int(module.hidden_size)
        elif isinstance(module, LAYERS):
            weight = next((w for matrix in MATRICES if (w := getattr(module, matrix, None)) is not None), None)
            if weight is None:
                continue
            groups = module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
            rows = weight.shape[out_dim(module)] * groups
            found[name] = rows // 3 if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None else rows
    return found
