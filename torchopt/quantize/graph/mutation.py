"""Code that changes a tensor in place, written as a graph of values: who reads the tensor afterwards reads what the change gives.

torch.fx records `F.relu_(y); return conv(y)` as two readers of y, and drops the first, since nobody names its result; so does
`z = relu(y)` with an in-place ReLU and `y` read again later. What really changes is seen on the examples: torch counts the versions of
every tensor. Each change becomes the operation that returns a new tensor, so that whoever looks at values later finds them as they were.

1. y.relu_(), F.relu_(y), nn.ReLU(inplace=True)(y)      later readers of y read its result; relu, nn.ReLU(inplace=False)
2. y += z, y.add_(z)                                    the same; y + z
3. y[0] = z                                             stays: it returns nothing
4. y[2:4].zero_(), and y itself read later              the part is written back: y[2:4] = y[2:4].zero_()
5. a change of another view, and the tensor read later  refused: the graph has no name for what is left of it
6. y.view(…)                                            y.reshape(…), which takes any layout of memory
"""

from __future__ import annotations

import inspect
import operator
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import ModelError

LIBRARIES = tuple(
    str(Path(file).parent) + os.sep for file in (torch.__file__, inspect.getfile(ModelError))
)  # no code of the user's

CHANGED = "changed"  # in the meta of a node: the nodes whose values it changes
OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def versions(node: fx.Node, value: Any) -> dict[fx.Node, int]:
    """Return how often the example of each input of `node` was changed; `value` gives the example of a node."""
    return {source: t._version for source in node.all_input_nodes if isinstance(t := value(source), torch.Tensor)}


def put_instead(graph: fx.Graph, node: fx.Node, other: fx.Node) -> None:
    """Let `other` be read and changed where `node` was, and erase `node`."""
    for user in node.users:
        if node in user.meta.get(CHANGED, ()):
            user.meta[CHANGED] = [other if changed is node else changed for changed in user.meta[CHANGED]]
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def write_as_values(model: nn.Module, graph: fx.Graph, value: Any) -> None:
    """Rewrite the changes that a graph makes in place, in place.

    Args:
        model: whose modules the graph calls; those with an `inplace` attribute get it set to False.
        graph: with `CHANGED` noted.
        value: gives the example of a node.

    Raises:
        ModelError: a part of a tensor is changed, and the tensor read again.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    memory = {node: _memory(value(node)) for node in graph.nodes}
    for node in list(graph.nodes):
        for changed in node.meta.pop(CHANGED, ()):
            for other in [n for n in place if memory[n] == memory[changed] and place[n] < place[node]]:
                later = [user for user in other.users if place.get(user, -1) > place[node]]  # not what was written back
                if value(other) is value(changed) is value(node):
                    for user in later:
                        user.replace_input_with(other, node)
                elif later and _is_part(changed, other):
                    with graph.inserting_after(node):
                        graph.call_function(operator.setitem, (other, changed.args[1], node))
                elif later and value(other) is not value(changed) and not _are_siblings(other, changed):
                    raise ModelError(_refusal(node))
        _return_anew(model, node)


def _memory(value: Any) -> int | None:
    """What tells the memory of an example; None where it is no tensor."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _is_part(view: fx.Node, whole: fx.Node) -> bool:
    """True for y[…] of y."""
    return view.target is operator.getitem and view.args[0] is whole


def _are_siblings(one: fx.Node, other: fx.Node) -> bool:
    """True for two pieces of one chunk, split or unbind."""
    pieces = one.target is other.target is operator.getitem and one.args[0] is other.args[0]
    return pieces and isinstance(one.args[1], int) and one.args[1] != other.args[1]


def _return_anew(model: nn.Module, node: fx.Node) -> None:
    """Call the operation that leaves its input as it is."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    elif "inplace" in node.kwargs:
        node.update_kwarg("inplace", False)
    elif node.op == "call_method" and _is_changing(name := str(node.target)) and hasattr(torch.Tensor, name[:-1]):
        node.target = name[:-1]
    elif node.op == "call_function":
        node.target = OPERATORS.get(node.target) or _new_tensor(node.target)


def _is_changing(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _new_tensor(function: Any) -> Any:
    """torch.relu for torch.relu_, F.hardtanh for F.hardtanh_; what has no such twin stays."""
    name = getattr(function, "__name__", "")
    if not _is_changing(name):
        return function
    return next((getattr(where, name[:-1]) for where in (torch, F) if getattr(where, name, None) is function), function)


def _refusal(node: fx.Node) -> str:
    return (
        f"quantize: {node.target} changes a part of a tensor in place that is read again afterwards ({_where(node)}); make a new tensor, "
        "such as torch.cat of the parts, move that code into a submodule, or use Quantize(mode='dynamic') or Quantize(mode='weight_only')"
    )


def _where(node: fx.Node) -> str:
    """The user's line that made a node."""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n\s+(.+)', node.stack_trace or "")
    own = [f"{file}, line {line}: {code}" for file, line, code in frames if not file.startswith(LIBRARIES)]
    return own[-1] if own else "its forward"


def take_any_layout(graph: fx.Graph) -> None:
    """Ask for `reshape` where the code asks for `view`: the same numbers, and images may be channels last."""
    for node in graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
            node.target = "reshape"
