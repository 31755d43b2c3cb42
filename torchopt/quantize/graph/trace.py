"""From a module to its graph: symbolic tracing that knows the shapes, and leaves alone what it cannot follow.

Every value of the graph has an example beside it, a `FakeTensor` with a shape and no data. So tracing follows control flow that depends
on shapes only (`if x.dim() == 3`, padding to a multiple of the window, one tensor cropped to another), and the graph still computes with
the sizes that it is given. A submodule whose forward depends on data (`if x.sum() > 0`) is kept whole as a leaf, and its inner layers
get what needs no graph; if it is the model's own forward that cannot be followed, the error names the line.

Functions that a library marks as leaves (`torch.fx.wrap`, as torchvision does around window attention) are followed where they can be.
Networks are traced in evaluation mode, which is what is deployed. Modules that only regularize in training (stochastic depth) stay
modules, so that training turns them on; so do dropout functions (`dropout.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
import traceback
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.proxy import Attribute
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.errors import ModelError
from torchopt.network.surgery import evaluating, set_module
from torchopt.quantize.graph.dropout import as_modules, regularizes
from torchopt.quantize.graph.functional import call_layers, computed_weights, drop_identities, move_inner
from torchopt.quantize.graph.graphs import HOOKS, QuantizableGraph, Was
from torchopt.quantize.graph.mutation import CHANGED, LIBRARIES, put_instead, take_any_layout, versions, write_as_values
from torchopt.quantize.graph.ranks import answer_ranks
from torchopt.quantize.layers.float_layers import LEFT, layer_class

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
        if kind == "call_function" and _only_marked(target):
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


def trace(model: nn.Module, example_inputs: tuple[Any, ...] = ()) -> tuple[QuantizableGraph, list[str]]:
    """Return the graph of `model` over its own submodules, and the paths of those that could not be followed.

    Args:
        model: a network.
        example_inputs: one call's positional arguments; only their shapes and types matter.

    Raises:
        ModelError: the model's own forward cannot be traced.
    """
    leaves: list[str] = []
    fixed = _left_out(model, example_inputs)
    with _slow_attention(), evaluating(model):
        while True:
            tracer = Tracer(leaves, example_inputs)
            try:
                graph = tracer.trace(model, concrete_args=fixed)
            except Exception as error:  # whatever the model's code does with a proxy
                if tracer.inside and tracer.inside[-1] not in leaves:
                    leaves = [*leaves, tracer.inside[-1]]
                else:
                    raise ModelError(_untraceable(model, error)) from error
            else:
                break
    _require(graph, example_inputs)
    return _traced(model, graph), leaves


def _traced(model: nn.Module, graph: fx.Graph) -> QuantizableGraph:
    for node in graph.nodes:
        if not _only_marked(node.target):  # torch.fx took it for the function that was followed to it
            node.meta.pop("is_wrapped", None)
    answer_ranks(graph, example)
    _call_linear_layers(model, graph)
    layers = call_layers(model, graph, example)
    reasons = computed_weights(model, graph)
    drop_identities(model, graph)
    moved = move_inner(model, graph, layers)
    for name, module in moved.items():
        model.add_module(name, module)
    take_any_layout(graph)
    write_as_values(model, graph, example)
    traced = QuantizableGraph(model, graph, type(model).__name__)
    for path, layer in layers.items():
        set_module(traced, path, layer)
    for path, reason in reasons.items():
        traced.get_submodule(path).__dict__[LEFT] = reason
    as_modules(traced)
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_") and name not in vars(traced)}
    type(traced).was = Was(of=type(model), attributes=plain)
    for hooks in HOOKS:
        traced.__dict__[hooks].update(model.__dict__[hooks])
    traced.train(model.training)
    return traced


def _call_linear_layers(model: nn.Module, graph: fx.Graph) -> None:
    """Write `F.linear(x, layer.weight, bias)` as a call of that layer (window attention reads its layers so).

    Another bias than the layer's own is added as their difference: swin_v2 silences a part of its layer's.
    """
    for node in graph.find_nodes(op="call_function", target=F.linear):
        x, weight, bias = (*node.args, *(node.kwargs[k] for k in ("weight", "bias") if k in node.kwargs), None)[:3]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        path, _, name = str(weight.target).rpartition(".")
        layer = model.get_submodule(path)
        if name != "weight" or type(layer) is not nn.Linear or (bias is None and layer.bias is not None):
            continue
        own = bias is None or (isinstance(bias, fx.Node) and bias.target == f"{path}.bias")
        with graph.inserting_before(node):
            call = graph.call_module(path, (x,))
            call.meta.update(node.meta)
            if not own:
                apart = bias if layer.bias is None else graph.call_function(torch.sub, (bias, graph.get_attr(f"{path}.bias")))
                call = graph.call_function(torch.add, (call, apart))
                call.meta.update(node.meta)
        put_instead(graph, node, call)


def _require(graph: fx.Graph, example_inputs: tuple[Any, ...]) -> None:
    """Take the defaults away from what the example gives: the graph is that of a call with it, and says so by its signature."""
    for node, given in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if given is not None and not str(node.target).startswith("*"):
            node.args = ()


def _left_out(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Optional arguments that the example leaves at None, such as masks: fixed so, where the forward asks which it is."""
    parameters = list(inspect.signature(model.forward).parameters.values())[len(example_inputs) :]
    return {p.name: None for p in parameters if p.default is None}


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep torch's encoder layers from the fused kernel, which goes past their own submodules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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


def _only_marked(target: Any) -> bool:
    """True for a plain Python function of a library or a user: torch's own are operations."""
    return isinstance(target, types.FunctionType) and not target.__module__.startswith(("torch.", "torchopt."))


def _untraceable(model: nn.Module, error: Exception) -> str:
    """Where tracing failed, in the user's own code, and what helps."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "its forward"
    return (
        f"quantize: the forward of {type(model).__name__} depends on data and cannot be traced ({where}): "
        f"{str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__}; move that part into a submodule, "
        "or use Quantize(mode='dynamic') or Quantize(mode='weight_only')"
    )
