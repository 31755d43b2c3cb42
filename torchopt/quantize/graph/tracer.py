"""The tracer itself: symbolic tracing that knows the shapes, as each value has an example beside it without data.

An example is a `FakeTensor`. So control flow that depends on shapes only is followed, and the graph still computes with the sizes that it
is given. What a module's code does with a value that has no example is an error, by which `trace.py` finds the module to leave whole.
"""

from __future__ import annotations

import operator
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.proxy import Attribute
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.quantize.graph.dropout import regularizes
from torchopt.quantize.graph.mutation import CHANGED, versions
from torchopt.quantize.layers.float_layers import layer_class

EXAMPLE = "example"  # in the meta of a node: its value on the example inputs, without data
OPEN = (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer)


class Unknown(Exception):  # noqa: N818 - no error of a user's
    """A value has no example."""


def _changing(target: Any) -> Any:
    """`y += z` as a call; torch.fx would write y = y + z, and other names of y would keep the old value."""
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


class Seen(fx.Proxy):
    """A proxy that also answers len(), of shapes and tuples, and takes assignments to its parts."""

    def __len__(self) -> int:
        value = example(self.node)
        return len(value) if isinstance(value, tuple | list) else int(super().__len__())

    def __getattr__(self, k: str) -> Attribute:
        return SeenAttribute(self, k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    __iadd__, __isub__, __imul__, __itruediv__ = map(_changing, (operator.iadd, operator.isub, operator.imul, operator.itruediv))


class SeenAttribute(Attribute):
    """`x.shape`, of which len() may be asked too."""

    __len__ = Seen.__len__
    __getattr__ = Seen.__getattr__  # type: ignore[assignment]


class Tracer(fx.Tracer):
    """torch.fx's tracer, which remembers where it is and what shapes the values have."""

    def __init__(self, leaves: list[str], example_inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.leaves = leaves
        self.record_stack_traces = True  # an error names the line
        self.thread = (
            threading.get_ident()
        )  # torch.fx replaces the call of every module, in all threads; the others are not traced
        self.inside: list[str] = []
        self.looking = False  # while an example is computed, modules and parameters are themselves
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = iter([self.fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example_inputs])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for torch's own layers and what computes as one, for what cannot be followed, and for what only regularizes."""
        if module_qualified_name in self.leaves:
            return True
        if isinstance(m, OPEN):
            return False
        return regularizes(m) or layer_class(m) is not None or bool(super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into `m`, and remember it while an error may come from it."""
        if self.looking or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What an attribute of a module is: a parameter is a node of the graph."""
        apart = self.looking or threading.get_ident() != self.thread
        return attr_val if apart else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Follow a function that was only marked as a leaf."""
        if kind == "call_function" and only_marked(target):
            try:
                result = target(*args, **kwargs)
            except Exception:
                result = None
            if isinstance(result, fx.Proxy):
                return result
            args = self._lists(args)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def _lists(self, args: Any) -> Any:
        """Make lists anew in each call: a library's function may write into them, and a graph's constants are not to be changed."""
        return tuple(self.create_proxy("call_function", list, (tuple(a),), {}) if isinstance(a, list) else a for a in args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note the node's example."""
        node = super().create_node(*args, **kwargs)
        if node.op != "output":
            node.meta[EXAMPLE] = self._example(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows its length."""
        return Seen(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer what depends on shapes only."""
        value = example(obj.node)
        return bool(value) if isinstance(value, bool | int | float | tuple | str) else bool(super().to_bool(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Step through shapes and tuples."""
        value = example(obj.node)
        return (
            iter([operator.getitem(obj, i) for i in range(len(value))]) if isinstance(value, tuple | list) else super().iter(obj)
        )

    def _example(self, node: fx.Node) -> Any:
        """The value of a node on the example inputs; `Unknown` where it cannot be told without data."""
        if node.op == "placeholder":
            return next(self.inputs, node.args[0] if node.args else Unknown)
        self.looking = True
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), _known)
            before = versions(node, example)
            with self.fake, torch.no_grad():
                value = self._run(node, args, kwargs)
            node.meta[CHANGED] = [source for source, version in versions(node, example).items() if version != before[source]]
            return value
        except Exception:
            return Unknown
        finally:
            self.looking = False

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))  # type: ignore[union-attr]
            if type(module).forward is _BatchNorm.forward and not kwargs:  # it took half the time, and keeps the shape
                return torch.empty_like(*args)
            state: dict[str, torch.Tensor] = {n: self.fake.from_tensor(t) for n, t in module.named_buffers()}  # batch norm counts
            return torch.func.functional_call(module, state, args, kwargs)
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.root.get_submodule(owner), name)  # type: ignore[union-attr]


def example(node: fx.Node) -> Any:
    """Return the value of a node on the example inputs, tensors without data; `Unknown` where there is none."""
    return node.meta.get(EXAMPLE, Unknown)


def forget(graph: fx.Graph) -> None:
    """Drop the examples, of which a graph that is kept has no need."""
    for node in graph.nodes:
        node.meta.pop(EXAMPLE, None)


def _known(node: fx.Node) -> Any:
    value = example(node)
    if value is Unknown:
        raise Unknown
    return value


def only_marked(target: Any) -> bool:
    """True for a plain Python function of a library or a user: torch's own are operations."""
    return isinstance(target, types.FunctionType) and not target.__module__.startswith(("torch.", "torchopt."))
