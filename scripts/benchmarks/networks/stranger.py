"""What a stranger brings: a network, one call's arguments, and how to draw more of them.

Weights are random, with statistics under which activations stay alive: what is measured is whether the tool computes the same network,
and a network whose outputs are all zero would hide everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """A network of somebody else's, by name; `draw(n)` gives inputs of a batch of n, or of the one size where there is no batch."""

    name: str
    manner: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Inputs]
    batched: bool = True

    def model(self) -> nn.Module:
        """The network with living statistics, in evaluation mode; always the same one."""
        torch.manual_seed(0)
        return alive(self.build(), [self.draw(16) for _ in range(2)]).eval()

    def batches(self, count: int, size: int, seed: int) -> list[Inputs]:
        """`count` batches; those of one seed are always the same."""
        torch.manual_seed(seed)
        return [self.draw(size) for _ in range(count)]


def alive(model: nn.Module, batches: list[Inputs]) -> nn.Module:
    """Statistics of the data and random affine parameters, in place: fresh ones are 0 and 1, which hides what mixes them up, and under
    random ones the signal of deep networks dies."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith(("gamma", "ls", "layer_scale", "lambda")):
            nn.init.uniform_(parameter.data, 0.5, 1.0)
        elif not parameter.any():
            nn.init.normal_(parameter.data, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    for module in model.modules():
        if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.7, 1.3)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in batches if norms else ():
            model.train()(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def pictures(size: int, channels: int = 3) -> Callable[[int], Inputs]:
    """Draws (n, channels, size, size) pictures: smooth, as photographs are, with a little noise."""

    def draw(n: int) -> Inputs:
        coarse = torch.randn(n, channels, 8, 8)
        smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
        return (smooth + 0.1 * torch.randn(n, channels, size, size),)

    return draw


def normal(*shape: int) -> Callable[[int], Inputs]:
    """Draws (n, *shape) of a standard normal distribution."""
    return lambda n: (torch.randn(n, *shape),)


def tokens(length: int, vocabulary: int) -> Callable[[int], Inputs]:
    """Draws (n, length) token numbers."""
    return lambda n: (torch.randint(1, vocabulary, (n, length)),)


def conv(i: int, o: int, k: int = 3, s: int = 1, activation: type[nn.Module] = nn.ReLU, **options: int) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False, **options), nn.BatchNorm2d(o), activation())
