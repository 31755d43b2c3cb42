"""A traced network as plain data: the nodes of an FX graph, written without pickle and read without running foreign code.

Quantization leaves a `torch.fx.GraphModule`: the original's modules, some `FixedQuantize`, and a graph that says in which order they
are called. The modules' tensors go into safetensors; this file writes the graph as JSON-able lists, and rebuilds it from them. Only
tensor operations may be named by a graph: a file cannot make torchopt call anything else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import _get_qualified_name

from torchopt.errors import FileError

Plain = dict[str, Any]
BESIDE: dict[str, Callable[..., Any]] = {  # no tensor operations, and harmless
    "getattr": getattr,
    "builtins.getattr": getattr,
    "torch._assert": torch._assert,
    "math.ceil": math.ceil,  # of sizes
    "math.floor": math.floor,
    "torch.fx._symbolic_trace._assert_is_none": _assert_is_none,
}


def describe(graph: fx.Graph) -> list[Plain]:
    """Return the nodes of a graph as JSON-able dicts.

    Example:
        >>> nodes = describe(fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph)
        >>> [(n["op"], n["target"]) for n in nodes]
        [('placeholder', 'input'), ('call_module', '0'), ('output', 'output')]
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": node.target if isinstance(node.target, str) else _get_qualified_name(node.target),
            "args": _write(node.args),
            "kwargs": _write(node.kwargs),
        }
        for node in graph.nodes
    ]


def rebuild(nodes: list[Plain], modules: nn.Module, where: str) -> fx.GraphModule:
    """Return the GraphModule whose graph `describe` wrote, over the submodules and parameters of `modules`.

    Args:
        nodes: what `describe` returned.
        modules: a root that owns every module and tensor that the graph names.
        where: what to blame in an error, such as the file's name.

    Raises:
        FileError: a node is damaged, or names something that is no tensor operation.

    Example:
        >>> root = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> twin = rebuild(describe(fx.symbolic_trace(root).graph), root, "example")
        >>> x = torch.randn(1, 2)
        >>> torch.equal(twin(x), root(x))
        True
    """
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for node in nodes:
        try:
            op, target = node["op"], node["target"]
            args, kwargs = _read(node["args"], known), _read(node["kwargs"], known)
            name = node["name"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{where}: the graph's node {node!r} is damaged ({error}); save the model again") from error
        resolved = (
            _function(target, where) if op == "call_function" else _method(target, where) if op == "call_method" else target
        )
        known[name] = graph.create_node(op, resolved, tuple(args), dict(kwargs), name=name)
    try:
        return fx.GraphModule(modules, graph)
    except (AttributeError, RuntimeError) as error:
        raise FileError(f"{where}: the graph names a module that the network lacks ({error}); give the same network") from error


def _write(value: Any) -> Any:
    """Arguments as JSON, each kind that JSON lacks tagged in a one-key dict."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"tuple": [_write(v) for v in value]}
        case list():
            return [_write(v) for v in value]
        case slice():
            return {"slice": [_write(v) for v in (value.start, value.stop, value.step)]}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case dict():
            return {"dict": {str(k): _write(v) for k, v in value.items()}}
        case _ if value is Ellipsis:
            return {"ellipsis": True}
    raise FileError(
        f"save: the traced graph holds an argument of type {type(value).__name__}, which cannot be written: {value!r}"
    )


def _read(value: Any, known: dict[str, fx.Node]) -> Any:
    match value:
        case {"node": str(name)}:
            return known[name]
        case {"tuple": list(parts)}:
            return tuple(_read(v, known) for v in parts)
        case {"slice": [start, stop, step]}:
            return slice(_read(start, known), _read(stop, known), _read(step, known))
        case {"dtype": str(name)} if isinstance(getattr(torch, name), torch.dtype):
            return getattr(torch, name)
        case {"device": str(name)}:
            return torch.device(name)
        case {"ellipsis": True}:
            return Ellipsis
        case {"dict": dict(entries)}:
            return {k: _read(v, known) for k, v in entries.items()}
        case list():
            return [_read(v, known) for v in value]
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"unknown argument {value!r}")


def _function(target: str, where: str) -> Callable[..., Any]:
    """Resolve a qualified name to a tensor operation: torch.<op>, torch.nn.functional.<op>, operator.<op>, or getattr."""
    module, _, name = target.rpartition(".")
    places: dict[str, Any] = {
        "torch": torch,
        "torch.nn.functional": nn.functional,
        "torch.functional": torch.functional,  # what `torch.einsum` is
        "torch._C._nn": torch._C._nn,  # what `F.linear` and `F.gelu` are
        "_operator": operator,
        "operator": operator,
    }
    operations = {"torch": dir(torch._C._VariableFunctions), "torch.functional": torch.functional.__all__}
    allowed = name in operations.get(module, [name])
    if target in BESIDE:
        return BESIDE[target]
    if module in places and allowed and not name.startswith("_") and callable(getattr(places[module], name, None)):
        return getattr(places[module], name)  # type: ignore[no-any-return]
    raise FileError(f"{where}: the graph calls {target!r}, which is no tensor operation; the file is damaged or hostile")


def _method(target: str, where: str) -> str:
    if target.startswith("_") or not callable(getattr(torch.Tensor, target, None)):
        raise FileError(
            f"{where}: the graph calls the method {target!r}, which tensors do not have; the file is damaged or hostile"
        )
    return target
