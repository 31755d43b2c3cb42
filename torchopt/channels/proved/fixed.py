"""Randomness held still, so that a network that draws numbers in its forward pass can be compared with a smaller one.

A variational autoencoder's noise has the width of its latent channels: with fewer channels another number of values is drawn, and no
seed makes two such runs comparable. Here the k-th draw of a run gives one number, the same wherever it lands: noise tells channels
apart as little as before, and a cut that is right gives equal outputs. Dropout keeps everything. What picks by number (permutations,
integers, samples of a distribution) is drawn from a seed of its own.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.channels.follow.call import Call
from torchopt.process.random_state import random_state_kept

NORMAL, UNIFORM = {"randn", "randn_like"}, {"rand", "rand_like"}
IN_PLACE = {"normal", "uniform", "exponential", "log_normal", "cauchy", "geometric"}  # of numbers: a fill


@contextlib.contextmanager
def held_still() -> Iterator[None]:
    """Let all randomness inside be the same in each run; the caller's generators stay as they were.

    Example:
        >>> with held_still():
        ...     noise = torch.randn(2, 3)
        >>> len(noise.unique())
        1
    """
    with random_state_kept(seed=0), _HeldStill():
        yield


class _HeldStill(TorchDispatchMode):
    """Every operator that draws gives one number everywhere, another at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = Counter[str]()  # by operator: another number of fused attentions must not change what follows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, None)
        self.draws[call.name] += 1
        seed = zlib.crc32(f"{call.name} {self.draws[call.name]}".encode())
        generator = torch.Generator().manual_seed(seed)
        in_place = func._schema.is_mutable
        if call.name == "native_dropout":
            return _all_kept(call)
        if call.name == "bernoulli":
            return _certain(call)
        if call.name in NORMAL | UNIFORM:
            draw = torch.randn if call.name in NORMAL else torch.rand
            return func(*args, **(kwargs or {})).fill_(float(draw((), generator=generator)))
        if call.name in IN_PLACE and in_place:
            one = args[0].new_empty(1)
            torch.manual_seed(seed)
            func(one, *args[1:], **({**(kwargs or {}), "generator": None}))
            return args[0].copy_(one.expand(args[0].shape) if args[0].dim() else one[0])
        if call.name == "normal":  # of tensors: means, and deviations
            mean, std = call.given["mean"], call.given["std"]
            return mean + std * float(torch.randn((), generator=generator))
        torch.manual_seed(seed)
        return func(*args, **(kwargs or {}))


def _all_kept(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x, p, train = call.given["input"], call.given["p"], call.given["train"]
    scale = 1 / (1 - p) if train is not False and p < 1 else 1.0
    return x * scale, torch.ones_like(x, dtype=torch.bool)


def _certain(call: Call) -> torch.Tensor:
    """What is likely happens; so does what a plain number makes possible at all: dropout keeps everything."""
    x = call.tensors[0]
    p = call.given.get("p")
    if isinstance(p, torch.Tensor):
        drawn = (p >= 0.5).to(x.dtype)
    elif p is not None:
        drawn = torch.full_like(x, float(p > 0))
    else:
        drawn = (x >= 0.5).to(x.dtype)
    return x.copy_(drawn) if call.func._schema.is_mutable else drawn.expand(x.shape).clone()
