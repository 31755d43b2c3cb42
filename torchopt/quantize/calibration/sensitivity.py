"""How much each layer's rounding alone moves the outputs: the order in which layers are given up where integers cost too much.

harm of a layer = mean (f(x) − f̂(x))²,    f̂ with the layer's weight and the grid of its input rounded, and nothing else
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.network.batches import Batch, model_inputs
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.modules import Fused


@torch.no_grad()
def harms(ready: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the harm of every quantized layer, by module path.

    Args:
        ready: a prepared and calibrated model; it is not touched.
        batches: inputs to run; a few dozen samples are plenty.

    Example:
        >>> from torchopt import Quantize, Rule, calibrate, prepare
        >>> x = torch.randn(32, 8)
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rules = [Rule("0", quantize=Quantize(weight_bits=2)), Rule("2", quantize=Quantize())]
        >>> found = harms(calibrate(prepare(net, rules, (x,)), [x], progress=False), [x])
        >>> found["0"] > found["2"]
        True
    """
    trial, inputs = copy.deepcopy(ready).eval(), [model_inputs(ready, batch) for batch in batches]
    layers = {path: module for path, module in trial.named_modules() if isinstance(module, Fused)}
    for module in trial.modules():
        if isinstance(module, Fused | ActivationQuantizer):
            module.enable_fake_quant(False)

    def outputs() -> torch.Tensor:
        given = (tree_leaves(trial(*args, **kwargs)) for args, kwargs in inputs)
        return torch.cat([x.float().flatten() for leaves in given for x in leaves if isinstance(x, torch.Tensor)])

    exact, found = outputs(), {}
    for path, layer in layers.items():
        rounded = [layer, *layer.reads]
        for part in rounded:
            part.enable_fake_quant()
        found[path] = float((outputs() - exact).square().mean())
        for part in rounded:
            part.enable_fake_quant(False)
    return found
