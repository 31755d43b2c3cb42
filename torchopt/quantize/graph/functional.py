"""Layers called as functions, written as calls of layers: `F.conv2d(x, self.weight, …)` is what a convolution computes.

A subclass of one of torch's layers is what it computes. Its forward is followed, and the call that it ends in names its own tensors; so

    conv2d(x, P.weight, P.bias, stride, padding, …)            becomes a call of P, a plain nn.Conv2d over the same tensors
    batch_norm(x, P.running_mean, P.running_var, P.weight, …)   becomes a call of P, a plain batch norm, which follows its own mode

and the rest of the forward (padding, an activation) stays in the graph as it is. Modules inside P move beside the network. A weight that
is computed before it is used (standardized convolutions) belongs to no plain layer, and stays float.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.network.copies import twin
from torchopt.network.core_layer import CONV, EMBED, plain
from torchopt.network.proof import undisturbed
from torchopt.quantize.graph.mutation import put_instead

Fields = dict[str, Any]
CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
}  # fmt: skip
TRANSPOSED: dict[Any, type[nn.Module]] = {
    torch.conv_transpose1d: nn.ConvTranspose1d, torch.conv_transpose2d: nn.ConvTranspose2d,
    torch.conv_transpose3d: nn.ConvTranspose3d, F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
OPERANDS: dict[str, tuple[str, ...]] = {  # the arguments of each kind of function in their order
    "linear": ("input", "weight", "bias"),
    "conv": ("input", "weight", "bias", *CONV),
    "transposed": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "embedding": ("input", "weight", *EMBED),
}
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
BESIDE = "beside_"  # begins the name of a module that stood inside a layer


@dataclass(kw_only=True, eq=False)
class Layer:
    """What the calls of one module's tensors say it is."""

    name: str
    fields: Fields
    bias: bool
    nodes: list[fx.Node] = field(default_factory=list)


def call_layers(model: nn.Module, graph: fx.Graph, shape_of: Any) -> dict[str, nn.Module]:
    """Write layers that a graph calls as functions as calls of modules, in place; return the plain layers, by path.

    Args:
        model: whose modules the graph calls.
        graph: the graph, traced in evaluation mode.
        shape_of: gives the example of a node.
    """
    found: dict[str, Layer | None] = {}
    for node in graph.nodes:
        path, layer = _layer(model, node, shape_of)
        if path is None:
            continue
        known = found.setdefault(path, layer)
        if layer is None or known is None or (known.name, known.fields, known.bias) != (layer.name, layer.fields, layer.bias):
            found[path] = None  # called in two ways: no one layer is both
        elif known is not layer:
            known.nodes += layer.nodes
    layers = {path: layer for path, layer in found.items() if layer is not None}
    for path, layer in layers.items():
        for node in layer.nodes:
            with graph.inserting_before(node):
                call = graph.call_module(path, (node.args[0] if node.args else node.kwargs["input"],))
            call.meta.update(node.meta)
            put_instead(graph, node, call)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    return {path: _plain(model.get_submodule(path), layer) for path, layer in layers.items()}


def _plain(module: nn.Module, layer: Layer) -> nn.Module:
    tensors = module._parameters | module._buffers | ({} if layer.bias else {"bias": None})
    return plain(tensors, layer.name, layer.fields).train(module.training)


def computed_weights(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Return why, by path, of layers whose weight a graph reads and does not multiply with: it computes another one from it."""
    reasons, called = {}, {str(node.target) for node in graph.find_nodes(op="call_module")}
    for node in graph.find_nodes(op="get_attr"):
        path = _owner(node, "weight")
        module = model.get_submodule(path) if path else None
        if path and path not in called and isinstance(module, LAYERS):
            reasons[path] = (
                f"its forward computes another weight from it in each call ({type(module).__name__}), and no integer layer does; it stays "
                "float (where the weight is final, put a plain layer with the computed one in its place)"
            )
    return reasons


def drop_identities(model: nn.Module, graph: fx.Graph) -> None:
    """Take `nn.Identity` out of a graph, in place: networks hold one where a dropout or an activation could be."""
    for node in graph.find_nodes(op="call_module"):
        module = model.get_submodule(str(node.target))
        if type(module) is nn.Identity and not module._forward_hooks and not module._forward_pre_hooks and len(node.args) == 1:
            put_instead(graph, node, node.args[0])


def move_inner(model: nn.Module, graph: fx.Graph, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Let a graph call the modules inside `layers` beside the network, in place; return them by their new names."""
    moved: dict[str, nn.Module] = {}
    for node in graph.find_nodes(op="call_module"):
        inner = str(node.target)
        if any(inner.startswith(f"{path}.") for path in layers):
            node.target = beside(inner)
            moved[node.target] = model.get_submodule(inner)
    return moved


def beside(path: str) -> str:
    """Return the name under which a module that stood inside a layer is found.

    Example:
        >>> beside("stem.bn1.act")
        'beside_stem__bn1__act'
    """
    return BESIDE + path.replace(".", "__")


def _layer(model: nn.Module, node: fx.Node, shape_of: Any) -> tuple[str | None, Layer | None]:
    """The module whose tensors a node computes with, and the layer that it is there."""
    if node.op != "call_function":
        return None, None
    kind, cls = _kind(node.target)
    if not kind:
        return None, None
    given = dict(zip(OPERANDS[kind], node.args, strict=False)) | dict(node.kwargs)
    path = _owner(given.get("running_mean" if kind == "norm" else "weight"), "running_mean" if kind == "norm" else "weight")
    if path is None or not path:
        return None, None
    module = model.get_submodule(path)
    if kind == "norm":
        return (path, _norm(path, module, node, given, shape_of)) if isinstance(module, _BatchNorm) else (None, None)
    if (
        cls is None
        or not isinstance(module, cls)
        or type(module).__module__.startswith("torch.")
        or module._parameters.get("weight") is None
    ):
        return None, None
    bias = given.get("bias")
    fields = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    if (bias is not None and _owner(bias, "bias") != path) or any(isinstance(n, fx.Node) for n in _leaves(fields)):
        return path, None
    return path, Layer(name=cls.__name__, fields=fields, bias=bias is not None, nodes=[node])


def _kind(target: Any) -> tuple[str, type[nn.Module] | None]:
    if target is F.linear:
        return "linear", nn.Linear
    if target is F.embedding:
        return "embedding", nn.Embedding
    if target in CONVOLUTIONS:
        return "conv", CONVOLUTIONS[target]
    if target in TRANSPOSED:
        return "transposed", TRANSPOSED[target]
    return ("norm", _BatchNorm) if target is F.batch_norm else ("", None)


def _norm(path: str, module: _BatchNorm, node: fx.Node, given: Fields, shape_of: Any) -> Layer | None:
    """The batch norm that a call with running statistics is, where in training it follows the batch as torch's does."""
    own = all(
        given.get(name) is None if module._parameters.get(name) is None else _owner(given.get(name), name) == path
        for name in ("weight", "bias")
    )
    dims = getattr(shape_of(node), "ndim", 0)
    statistics = _owner(given.get("running_var"), "running_var") == path and given.get("training") is False
    if not (own and statistics and dims in NORMS and _follows(module, shape_of(node))):
        return None
    fields = {"eps": given.get("eps", 1e-5), "momentum": module.momentum}
    return Layer(name=NORMS[dims], fields=fields, bias=True, nodes=[node])


def _follows(module: _BatchNorm, like: torch.Tensor) -> bool:
    """True where a batch norm of anyone's own moves its running mean in training."""
    copy = twin(module)
    mean = module.running_mean
    assert mean is not None
    x = torch.randn((2, *like.shape[1:]), generator=torch.Generator().manual_seed(0)).to(mean.device) + 1
    with undisturbed(module), torch.no_grad():
        before = mean.clone()
        try:
            copy.train()(x)
        except (RuntimeError, TypeError, ValueError):
            return True  # it takes more than one tensor; the proof of the whole network decides
        return not torch.equal(before, mean)


def _owner(node: Any, name: str) -> str | None:
    """The path of the module whose own tensor `name` a node reads; None where it is computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, last = str(node.target).rpartition(".")
    return path if last == name else None


def _leaves(fields: Fields) -> list[Any]:
    found: list[Any] = []
    for value in fields.values():
        found += value if isinstance(value, tuple | list) else [value]
    return found
