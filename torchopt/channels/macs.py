"""Multiply-adds of one forward call, counted as it runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchopt.channels.arguments import Arguments, Examples
from torchopt.channels.follow.trace import step_by_step
from torchopt.channels.layers.attention import adopt
from torchopt.network.copies import copied
from torchopt.process.random_state import random_state_kept


def count_macs(model: nn.Module, example_inputs: Examples | Arguments) -> tuple[int, int]:
    """Return (multiply-adds of the convolutions and matrix products of one forward call, parameters).

    Example:
        >>> count_macs(nn.Linear(8, 4, bias=False), (torch.zeros(1, 8),))
        (32, 32)
        >>> count_macs(nn.MultiheadAttention(4, 2, bias=False), (torch.zeros(1, 4),) * 3)  # 4·4·4 and q·k, w·v
        (72, 64)
    """
    twin = copied(model).eval().requires_grad_(False)
    adopt(twin)  # attention as products, and not as one fused operator
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module.forward = step_by_step(module.forward)  # type: ignore[method-assign]
    counter = FlopCounterMode(display=False)
    inputs = Arguments.of(model, example_inputs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), random_state_kept(), counter:
        inputs.run(twin)
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in twin.parameters())
