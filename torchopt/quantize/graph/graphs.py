"""The graph module of a network in training: what it holds beside its graph survives copies and pickle."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from torchopt.state.marks import mark, unmark

HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith("_forward_"))
KEPT = ("_modules", *HOOKS)  # of a graph module, where torch's constructor keeps what the graph calls


@dataclass(frozen=True, kw_only=True)
class Was:
    """The class of a network that was traced, its plain attributes, and why layers are not in the graph, by path."""

    of: type[nn.Module]
    attributes: dict[str, Any]
    left: dict[str, str]


class QuantizableGraph(fx.GraphModule):
    """A graph module whose copies keep hooks, and all submodules: torchopt's step counter, and layers of which the graph reads a weight.

    Pickle takes the graph node by node. Torch would write the code and trace it again, by a tracer that wants to see the network, and
    through weights that are computed when they are read.
    """

    was: Was | None = None  # of each graph's own class, so that no file holds it

    def __getattr__(self, name: str) -> Any:
        """What the network had beside its forward: plain attributes, and methods, which run on the prepared layers.

        Raises:
            AttributeError: the graph has it not; says so.
        """
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            was = type(self).was
            if was is None or name.startswith("_"):
                raise
            if name in was.attributes:
                return was.attributes[name]
            method = getattr(was.of, name, None)
            if isinstance(method, types.FunctionType):
                return types.MethodType(method, self)
            raise AttributeError(
                f"{was.of.__name__} was prepared as the graph of its forward, which has no {name!r}; ask the network that it was made of"
            ) from error

    def __getitem__(self, key: int) -> nn.Module:
        """Layer `key` of a traced nn.Sequential, as prepared.

        Raises:
            IndexError: it is part of another layer now, or there was none.
        """
        found = self._modules.get(str(key))
        if found is None:
            raise IndexError(
                f"layer {key} is no layer of the prepared graph, or part of the one before it; ask the network that it was made of"
            )
        return found

    __iter__ = None  # layers that became part of others would be missing

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizableGraph:
        own, tables = type(self), self._modules.get("parametrizations")
        computed = [] if tables is None else list(tables._modules)
        for name in computed:  # a table on a parameter that the graph reads: fx copies that by its name, which the class computes
            mark(self, name, torch.empty(0))
        self.__class__ = own.__bases__[0] if computed else own
        try:
            twin: Any = super().__deepcopy__(memo)
        finally:
            self.__class__ = own
            for name in computed:
                unmark(self, name)
        for name in computed:
            twin._buffers.pop(name, None)
            unmark(twin, name)
        if computed:
            twin.__class__ = _with_properties(type(twin), own)
        type(twin).was = own.was
        kept = {name: value for name, value in self.__dict__.items() if name in KEPT}
        twin.__dict__.update(copy.deepcopy(kept, memo))
        return twin  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """What `remade_graph` takes."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_tracer_cls", "shape_env")}
        number = {node: i for i, node in enumerate(self.graph.nodes)}
        nodes = [
            (n.name, n.op, n.target, *fx.map_arg((n.args, n.kwargs), lambda source: Place(number[source])))
            for n in self.graph.nodes
        ]
        return remade_graph, (type(self).__name__, nodes, state)


def _with_properties(made: type, own: type) -> type:
    """A copy's own class, with the properties that compute weights; fx writes a graph's forward into the class, so none is shared."""
    left = ("__dict__", "__weakref__", "__doc__", "__module__", "forward")
    return type(own.__name__, (made,), {name: value for name, value in vars(own).items() if name not in left})


class Place(int):
    """The number of a node, where pickle would write the node and all others with it."""


def remade_graph(name: str, nodes: list[tuple[Any, ...]], state: dict[str, Any]) -> QuantizableGraph:
    """Return the graph module of which `QuantizableGraph.__reduce__` wrote the nodes and the state."""
    graph, made = fx.Graph(), list[fx.Node]()
    for called, op, target, args, kwargs in nodes:
        made.append(graph.create_node(op, target, _with_nodes(args, made), _with_nodes(kwargs, made), name=called))
    root = nn.Module()
    root.__dict__.update({kept: state[kept] for kept in ("_modules", "_parameters", "_buffers")})
    twin = QuantizableGraph(root, graph, name)
    twin.__dict__.update({kept: value for kept, value in state.items() if kept in KEPT or kept not in vars(twin)})
    twin.training = state["training"]
    return twin


def _with_nodes(value: Any, made: list[fx.Node]) -> Any:
    """Arguments with the nodes in their places again."""
    if isinstance(value, Place):
        return made[value]
    if isinstance(value, slice):
        return slice(*(_with_nodes(end, made) for end in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _with_nodes(one, made) for key, one in value.items()}
    if isinstance(value, tuple | list):
        parts = [_with_nodes(one, made) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
