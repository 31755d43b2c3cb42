"""Fuse what one integer kernel computes: layer, batch norm, activation become one training module.

1. conv or linear, then a batch norm that nothing else reads        → bn inside the layer
2. either of them, then ReLU, ReLU6, Hardtanh, or a clamp around 0   → activation inside the layer
3. a batch norm that follows no layer (DenseNet's, after Concat)     → a 1×1 depthwise convolution of ones with that bn inside
4. Hardswish, SiLU                                                   → value times gate
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.network.surgery import module_of, set_module
from torchopt.quantize.config import Quantize
from torchopt.quantize.graph.gates import expand, gate_of
from torchopt.quantize.graph.tracer import example
from torchopt.quantize.layers.float_layers import FusedEmbedding, fused
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.read_elsewhere import read_paths
from torchopt.quantize.targets import Target

FUNCTIONS: dict[Any, type[nn.Module]] = {torch.relu: nn.ReLU, F.relu: nn.ReLU, F.relu6: nn.ReLU6, torch.relu_: nn.ReLU}
METHODS = {"relu": nn.ReLU, "relu_": nn.ReLU}
CLAMPS = {torch.clamp, torch.clip, torch.clamp_min, "clamp", "clip", "clamp_min"}  # of one number: the least


def fuse(traced: fx.GraphModule, assignment: dict[str, Quantize], target: Target) -> list[str]:
    """Swap the assigned layers of a traced model for quantized ones, in place, with what they fuse with.

    Returns:
        Paths of assigned modules that the graph does not call as layers of a known class: they stay float.
    """
    left = []
    calls, read = _calls(traced), read_paths(traced)
    for path, config in assignment.items():
        module = traced.get_submodule(path) if path in calls else None
        layer = fused(module, config, target.weight_bits(config)) if module is not None else None
        if layer is None or isinstance(layer, FusedEmbedding):
            left.append(path)
            continue
        set_module(traced, path, layer)
        _absorb(traced, calls[path], layer, norms=path not in read)  # a folded norm would change what another reads
    if assignment:
        _lone_norms(traced, next(iter(assignment.values())), target)
    for node in list(traced.graph.nodes):
        if gate_of(traced, node) is not None and _from_integers(traced, node):
            expand(traced, node)
    traced.graph.lint()
    traced.recompile()
    return left


def activation_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return a ReLU-like module that computes what `node` does, or None: one that keeps what lies between two ends around 0."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, nn.ReLU6 | nn.ReLU):
            return type(module)()
        return _between(module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else None
    if node.op == "call_function" and node.target in FUNCTIONS:
        return FUNCTIONS[node.target]()
    if node.op == "call_method" and node.target in METHODS:
        return METHODS[str(node.target)]()
    if node.target is F.hardtanh:
        return _between(*_ends(node, ("min_val", "max_val"), (-1.0, 1.0)))
    return _between(*_ends(node, ("min", "max"), (None, None))) if node.target in CLAMPS else None


def ends_of(activation: nn.Module) -> tuple[float, float]:
    """Return what a ReLU-like module keeps: (0, 6) for ReLU6.

    Example:
        >>> ends_of(nn.ReLU()), ends_of(nn.Hardtanh())
        ((0.0, inf), (-1.0, 1.0))
    """
    return float(getattr(activation, "min_val", 0.0)), float(getattr(activation, "max_val", math.inf))


def _ends(node: fx.Node, names: tuple[str, str], default: tuple[Any, Any]) -> list[Any]:
    given = [*node.args[1:], *default[len(node.args) - 1 :]]
    return [node.kwargs.get(name, value) for name, value in zip(names, given, strict=True)]


def _between(low: Any, high: Any) -> nn.Module | None:
    """The module that clips to [low, high]; None where an end is no number, or the range does not hold 0."""
    high = math.inf if high is None else high
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 < high):
        return None
    if low == 0 and high in (6, math.inf):
        return nn.ReLU6() if high == 6 else nn.ReLU()
    return nn.Hardtanh(float(low), float(high))


def _calls(traced: fx.GraphModule) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _absorb(traced: fx.GraphModule, nodes: list[fx.Node], layer: Fused, *, norms: bool = True) -> None:
    """Cases 1 and 2, where each call of the layer is followed by the same, as in a head that several levels share."""
    paths = {str(norm.target) if norm is not None and norm.op == "call_module" else None for norm in map(_only_user, nodes)}
    path = paths.pop() if len(paths) == 1 else None
    if norms and path is not None and layer.bn is None:
        module = traced.get_submodule(path)
        alone = len(_calls(traced)[path]) == len(nodes)
        over_channels = all(_over_channels(node, layer) for node in nodes)
        if isinstance(module, _BatchNorm) and alone and module.track_running_stats and over_channels:
            layer.bn = module
            for node in nodes:
                _merge(traced, node, next(iter(node.users)))
            traced.delete_submodule(path)  # one place for it, so that its mode is the layer's to set
    followers = [_only_user(node) for node in nodes]
    activations = [None if follower is None else activation_of(traced, follower) for follower in followers]
    ends = {None if activation is None else (type(activation), ends_of(activation)) for activation in activations}
    if len(ends) == 1 and None not in ends:
        layer.act = activations[0]
        for node, follower in zip(nodes, followers, strict=True):
            assert follower is not None
            _merge(traced, node, follower)


def _over_channels(node: fx.Node, layer: Fused) -> bool:
    """True where axis 1, which a batch norm normalizes, holds the channels of the layer, each with a scale of its own.

    Not so for a linear layer over (N, nodes, features), and for a transposed convolution in groups, which share their scales.
    """
    if layer.out_axis == 1 and int(getattr(layer, "groups", 1)) > 1:
        return False
    value = example(node)
    return layer.channel_axis == 1 or (isinstance(value, torch.Tensor) and value.dim() == 2)


def _lone_norms(traced: fx.GraphModule, config: Quantize, target: Target) -> None:
    """Case 3: ORT has no integer batch norm, but integer depthwise convolutions."""
    for path, nodes in _calls(traced).items():
        norm = traced.get_submodule(path)
        convolution = _convolution(norm, nodes)
        if convolution is None or not all(_from_integers(traced, node, convolved=True) for node in nodes):
            continue
        ones = convolution(norm.num_features, norm.num_features, 1, groups=norm.num_features, bias=False)
        nn.init.ones_(ones.weight)
        ones.weight.requires_grad_(False)
        layer = fused(ones, config, target.weight_bits(config))
        assert layer is not None
        layer.bn = norm
        set_module(traced, path, layer)
        if len(nodes) == 1:
            _absorb(traced, [nodes[0]], layer)


def _convolution(norm: nn.Module, nodes: list[fx.Node]) -> Any:
    """The class of convolution that a batch norm with running statistics is one of, on channels with positions; None without them."""
    if not isinstance(norm, _BatchNorm) or type(norm).forward is not _BatchNorm.forward or not norm.track_running_stats:
        return None
    ranks = {getattr(example(node), "ndim", 0) for node in nodes}
    return {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(ranks.pop()) if len(ranks) == 1 else None


def _from_integers(traced: fx.GraphModule, node: fx.Node, *, convolved: bool = False) -> bool:
    """True where all that `node` reads was last computed by quantized layers: what follows a float layer stays float.

    With `convolved` linear layers are none of them: their results are floats at no cost.
    """
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        module = module_of(traced, source)
        if isinstance(module, Fused) and not (convolved and isinstance(module, nn.Linear)):
            continue
        if source.op in ("placeholder", "get_attr") or (module is not None and any(True for _ in module.parameters())):
            return False
        waiting += source.all_input_nodes
    return bool(seen)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _merge(traced: fx.GraphModule, node: fx.Node, absorbed: fx.Node) -> None:
    absorbed.replace_all_uses_with(node)
    traced.graph.erase_node(absorbed)
