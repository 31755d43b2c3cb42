"""How much a weight matters: the six scores.

    magnitude   |w|
    taylor      Σ_t |w·g|     Molchanov et al., "Importance estimation for neural network pruning" (2019, arXiv 1906.10771)
    movement    -Σ_t w·g      Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning" (2020, arXiv 2005.07683)
    wanda       |w|·‖x‖₂      Sun et al., "A simple and effective pruning approach for LLMs" (2023, arXiv 2306.11695)
    hessian     |w| for how many stay of each weight; the solver then chooses which, in `one_shot` alone
    random      a fixed permutation from the seed and the weight's name, so that masks are nested as the sparsity grows

with g = ∂L/∂w of each optimizer step, read from `.grad` when the step is counted: averaged over ranks and unscaled by then, as
the optimizer used it. What a score has gathered is kept in a buffer of the module (`<param>_score`, float32, of the weight's
shape; for wanda `<param>_inputs`, the sum of squares of each input channel), so that it travels in the `state_dict`.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchopt.errors import StateError
from torchopt.network.weights import Weight
from torchopt.prune.config import Prune
from torchopt.prune.select import Scores

GATHERS = ("taylor", "movement")  # scores that add up gradients


def gathered_name(param: str, config: Prune) -> str | None:
    """Return the name of the buffer in which this score gathers data, or None."""
    if config.score in GATHERS:
        return f"{param}_score"
    return f"{param}_inputs" if config.score == "wanda" else None


def empty_gathered(weight: Weight, config: Prune) -> torch.Tensor:
    """Return the buffer's start: zeros of the weight's shape, or of the number of input channels."""
    value = weight.trainable
    shape = value.shape if config.score in GATHERS else torch.Size([_input_channels(weight.module)])
    return torch.zeros(shape, dtype=torch.float32, device=value.device)


def add_gradient(
    total: torch.Tensor, weight: nn.Parameter, config: Prune, where: str, gradient: torch.Tensor | None = None
) -> None:
    """Add one step's gradient, `weight.grad` where none is given, to the running score, in place.

    Raises:
        StateError: the weight has no gradient; it was cleared before `torchopt.step`, or nothing was trained.
    """
    gradient = weight.grad if gradient is None else gradient
    if gradient is None:
        raise StateError(
            f"{where}: has no gradient, which score={config.score!r} needs; call torchopt.step(model) after "
            "optimizer.step() and before optimizer.zero_grad()"
        )
    change = weight.detach().float() * gradient.detach().float()
    total += change.abs() if config.score == "taylor" else -change


def add_inputs(total: torch.Tensor, module: nn.Module, x: torch.Tensor) -> None:
    """Add the squares of a layer's inputs, summed over everything but the input channels, in place.

    Args:
        total: float32, (in,).
        module: a convolution or a linear layer.
        x: its input; the channels are the last axis for a linear layer, else the last but the spatial ones.
    """
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    channels = x.detach().float().movedim(-1 - spatial, 0).flatten(1)  # (in, everything else)
    squares = channels.square().sum(dim=1)
    total += torch.where(squares.isfinite(), squares, torch.zeros_like(squares))  # a pass that overflowed tells nothing


def scores(weight: Weight, config: Prune, gathered: torch.Tensor | None) -> Scores:
    """Return the score of every element of `weight`, by `config.score`.

    Raises:
        StateError: a score that needs data has seen none.
    """
    value = weight.trainable.detach()
    if config.score in ("magnitude", "hessian"):
        return Scores(name=weight.name, values=value.contiguous(), absolute=True)
    if config.score == "random":
        return Scores(name=weight.name, values=_random(value, weight.name, config.seed))
    assert gathered is not None
    if not bool(gathered.any()):
        what = "forward passes, in training or calibration" if config.score == "wanda" else "training steps with gradients"
        raise StateError(f"{weight.name}: score={config.score!r} has seen no data; it needs {what} before masks can be chosen")
    if config.score == "wanda":
        return Scores(name=weight.name, values=(value.abs() * _input_norm(weight, gathered)).contiguous())
    return Scores(name=weight.name, values=gathered)


def _random(value: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    order = torch.randperm(value.numel(), generator=generator)  # float64 holds each index exactly
    return order.to(torch.float64).reshape(value.shape).to(value.device)


def _input_norm(weight: Weight, squares: torch.Tensor) -> torch.Tensor:
    """Return ‖x‖₂ of the input channel that each element of the weight reads, in a shape that multiplies the weight."""
    norm, value = squares.sqrt(), weight.trainable
    if weight.out_axis == 1:  # transposed convolution: (in, out / groups, ...)
        return norm.reshape(-1, *[1] * (value.dim() - 1))
    groups = weight.module.groups if isinstance(weight.module, _ConvNd) else 1
    rows = norm.reshape(groups, -1).repeat_interleave(value.shape[0] // groups, dim=0)  # (out, in / groups)
    return rows.reshape(*rows.shape, *[1] * (value.dim() - 2))


def _input_channels(module: nn.Module) -> int:
    return module.in_channels if isinstance(module, _ConvNd) else int(module.in_features)  # type: ignore[arg-type]
