"""What is written on a module beside its tensors and its own attributes; nothing else writes into a module's `__dict__`.

A mark is no attribute that the module's class declares, and no entry of its state. It is copied with the module, and pickled with it.
These are all:

    _<param>_grid               finalized layers: bits, axis and block of the weight's grid; `save` writes it into the header
    _torchopt_skipped           finalized networks: what was left alone, for reports
    torchopt_shrunken           shrunken networks: what `shrink` removed; `save` writes it into the header
    _torchopt_rounded_later     modules without a quantized layer: how `finalize` rounds their weights; rules and target say it again
    _torchopt_reading           layers: the weight is being rounded for another reader; gone when the call ends
    _torchopt_position          parametrizations: where the Parameter stood among the others of its module
    _torchopt_one_scale         layers: their buffer `one_scale`, read without waiting for a GPU; of modules without it, `save` writes it
    the name of a weight        layers under a mask: the masked weight that forward reads, made anew from Parameter and mask
"""

from __future__ import annotations

from typing import Any

from torch import nn


def mark(module: nn.Module, name: str, value: Any) -> None:
    """Write a mark on a module, past torch's registers: a Parameter or a module in it belongs to another place."""
    module.__dict__[name] = value


def marked(module: nn.Module, name: str, default: Any = None) -> Any:
    """Return what a mark says; `default` where there is none.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> mark(layer, "_torchopt_position", 3)
        >>> marked(layer, "_torchopt_position"), marked(layer, "_torchopt_reading", False)
        (3, False)
    """
    return module.__dict__.get(name, default)


def unmark(module: nn.Module, name: str) -> None:
    """Take a mark off; nothing where there is none."""
    if name in module.__dict__:
        del module.__dict__[name]
