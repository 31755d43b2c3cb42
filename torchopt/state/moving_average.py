"""Averages of a model in training: weights are averaged, masks, codes and counters are those of the model now.

    w ← β·w + (1 − β)·w_now        for floating-point tensors;        c ← c_now        for all others

(Polyak and Juditsky 1992.) Averaging codes would name other values, averaging masks would join them: 7 % zeros where 50 % were asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.errors import ConfigError

Tensors = tuple[Tensor, ...] | list[Tensor]


def ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Tensors, Tensors, Any], None]:
    """Return the exponential moving average for `torch.optim.swa_utils.AveragedModel` and for Lightning's `WeightAveraging`.

    Torch's own function averages whatever it is given; with `use_buffers=True`, Lightning's default, that breaks masks and codes, and
    `finalize` refuses the averaged model. This one averages parameters and other floating-point tensors (batch norm's statistics, ranges)
    and copies the rest.

    Args:
        decay: how much of the average stays in each update, in [0, 1].

    Returns:
        A function for the argument `multi_avg_fn`.

    Raises:
        ConfigError: `decay` lies outside.

    Example:
        >>> import torchopt
        >>> half = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1))
        >>> model = torchopt.prepare(torch.nn.Linear(8, 8), [torchopt.Rule("*", prune=half)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.9), use_buffers=True)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 8)).sum().backward()
        ...     optimizer.step()
        ...     _ = torchopt.step(model)
        ...     average.update_parameters(model)
        >>> int((torchopt.finalize(average).weight == 0).sum())
        32
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 <= decay <= 1.0:
        raise ConfigError(f"ema_multi_avg_fn: got decay={decay!r}; a number in [0, 1] is needed, 0.999 is usual")

    @torch.no_grad()
    def update(averages: Tensors, current: Tensors, _: Any) -> None:
        pairs = list(zip(averages, current, strict=True))
        means = [(a, now) for a, now in pairs if (a.is_floating_point() or a.is_complex()) and a.numel() > 1]
        if means:
            torch._foreach_lerp_([a for a, _ in means], [now for _, now in means], 1.0 - decay)
        for average, now in pairs:
            if not (average.is_floating_point() or average.is_complex()):
                average.copy_(now)
            elif average.numel() == 1:  # a range that has seen no data yet is infinite
                average.copy_(torch.where(torch.isfinite(average), average.lerp(now, 1.0 - decay), now))

    return update
