"""Saving and loading without pickle: tensors in safetensors, everything else as JSON in the file's header.

The header says what must be rebuilt around the tensors: the channels that `shrink` removed (the architecture plan), the rules and
the input shapes of a model in training, the traced graph of a quantized one, and the integer grids. Loading needs a freshly built
network of the original architecture; it is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx, nn

from torchopt.channels.plan import apply_plan, plan_of
from torchopt.compress.attach import attach
from torchopt.errors import ConfigError, FileError, StateError, TorchoptError
from torchopt.io.files import atomic_path
from torchopt.io.schema import build
from torchopt.network.copies import copied
from torchopt.network.core_layer import KINDS, described, plain
from torchopt.network.grid import SUFFIX, grids, set_grid
from torchopt.network.standard_layers import as_saved
from torchopt.network.surgery import set_module
from torchopt.network.traced import describe, rebuild
from torchopt.network.weights import IN_PROJECTION
from torchopt.process.ordinary import alone
from torchopt.quantize import (
    DynamicLinear,
    FixedQuantize,
    IntegerKernel,
    Rounded,
    beside,
    can_open,
    decide_as,
    decisions,
    link_kernels,
    open_attentions,
)
from torchopt.quantize.observers.own import OwnObserver, refuse_unknown
from torchopt.quantize.torch_ao import is_observer
from torchopt.rules import Rule
from torchopt.state.counter import State, find_state, require_state

FORMAT = 2  # 1 had no member counts of shared values
Header = dict[str, Any]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one safetensors file, atomically: prepared (masks, tables, observers, step), finalized, shrunken or plain.

    Args:
        model: the model, bare or wrapped; its state is written, not its class.
        path: the file, ".safetensors" by custom.

    Raises:
        FileError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> net = nn.Linear(3, 2)
        >>> save(net, file)
        >>> torch.equal(load(file, nn.Linear(3, 2)).weight, net.weight)
        True
    """
    found = require_state(model, "save") if find_state(model) is not None else None
    inner = found[0] if found else model
    header = _header(inner, found[1] if found else None)
    state = inner.state_dict()
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items() if isinstance(t, torch.Tensor)}
    header["extra"] = _as_json({name: value for name, value in state.items() if name not in tensors})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"torchopt": json.dumps(header)})


@alone()
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote, rebuilt over a copy of a freshly built network.

    Args:
        path: the file.
        model: a network of the original architecture, as it was before shrinking or preparing; its weights do not matter.

    Raises:
        FileError: the file is missing, truncated, or not torchopt's.
        StateError: the file belongs to another architecture.
        ConfigError: no model was given.
    """
    header, tensors = _read(Path(path))
    if model is None:
        raise ConfigError(f"{path}: holds tensors, not code; give a freshly built network: load(path, build_the_network())")
    fresh = copied(model)
    try:
        if "prepared" not in header:
            fresh = as_saved(fresh, tensors, header.get("linears", ()))
        _as_layers(fresh, header.get("traced", {}), tensors)
        apply_plan(fresh, header["plan"])
        rebuilt = _rebuild(fresh, header, tensors, str(path))
        rebuilt.load_state_dict(_versioned({**tensors, **header.get("extra", {})}, rebuilt), strict=True)
    except TorchoptError:
        raise
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        other = f"{path}: was saved from another architecture than {type(model).__name__}"
        raise StateError(f"{other}: {_first_line(error)}; give the network that was saved") from error
    _restore_grids(rebuilt, header["grids"])
    decide_as(rebuilt, header.get("prepared", {}).get("one_scale", {}))
    return rebuilt


def _header(model: nn.Module, state: State | None) -> Header:
    header: Header = {
        "format": FORMAT,
        "plan": state.plan if state is not None else plan_of(model),
        "linears": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)],
        "dynamic": [n for n, m in model.named_modules() if isinstance(m, DynamicLinear)],
        "rounded": {n: m.describe() for n, m in model.named_modules() if isinstance(m, Rounded)},
        "grids": {n: [g.bits, g.axis, g.block] for n, g in grids(model).items()},
    }
    if state is not None:
        header["prepared"] = {
            "rules": [_plain(rule) for rule in state.rules],
            "target": state.target,
            "inputs": state.example_inputs,
            "found": state.found,
            "frozen": state.frozen,
            "one_scale": decisions(model),
        }
    elif isinstance(model, fx.GraphModule):
        fixed = {name: m.describe() for name, m in model.named_children() if isinstance(m, FixedQuantize)}
        kernels = {name: m.describe() for name, m in model.named_children() if isinstance(m, IntegerKernel)}
        called = {str(node.target) for node in model.graph.find_nodes(op="call_module")}
        layers = {name: told for name in sorted(called) if (told := described(model.get_submodule(name))) is not None}
        header["traced"] = {"graph": describe(model.graph), "quantizers": fixed, "kernels": kernels, "layers": layers}
    return header


def _rebuild(fresh: nn.Module, header: Header, tensors: Mapping[str, torch.Tensor], where: str) -> nn.Module:
    """Give the network the modules and tensors that the file's tensors need."""
    if "prepared" in header:
        saved = header["prepared"]
        inputs = None if saved["inputs"] is None else tuple(map(_example, saved["inputs"]))
        for rule in saved["rules"]:
            refuse_unknown(rule)
        rules = [build(Rule, rule, ("rules", i)) for i, rule in enumerate(saved["rules"])]
        found = {name: tuple(counts) for name, counts in saved["found"].items()}
        for name, parameter in fresh.named_parameters(remove_duplicate=False) if "frozen" in saved else ():
            parameter.requires_grad_(name not in saved["frozen"])
        return attach(fresh, rules, inputs, found, saved["target"])
    attentions = [n for n, m in fresh.named_modules() if can_open(m) and f"{n}.{IN_PROJECTION}.weight".lstrip(".") in tensors]
    fresh, _ = open_attentions(fresh, dict.fromkeys(attentions))
    _add_biases(fresh, tensors)
    for name in header.get("dynamic", []):
        DynamicLinear.of(fresh.get_submodule(name))
    for name, ends in header.get("rounded", {}).items():
        Rounded.of(fresh.get_submodule(name), [None if end is None else FixedQuantize.described(end) for end in ends])
    for name in header["grids"]:
        owner, _, param = name.rpartition(".")
        fresh.get_submodule(owner).register_buffer(param + SUFFIX, torch.empty_like(tensors[name + SUFFIX]))
    if "traced" not in header:
        return fresh
    for name, fields in header["traced"]["quantizers"].items():
        fresh.add_module(name, FixedQuantize.described(fields))
    for name, fields in header["traced"].get("kernels", {}).items():
        fresh.add_module(name, IntegerKernel(*fields))
    rebuilt = rebuild(header["traced"]["graph"], fresh, where)
    link_kernels(rebuilt)
    return rebuilt


def _as_layers(model: nn.Module, traced: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put torch's own layers where the graph calls them and the network has others; what stands inside those moves beside the network."""
    inside = {beside(path): module for path, module in model.named_modules() if path}
    for node in traced.get("graph", ()):
        if node.get("op") == "call_module" and node.get("target") in inside:
            model.add_module(node["target"], inside[node["target"]])
    modules = dict(model.named_modules())
    for path, (name, fields) in traced.get("layers", {}).items():
        own = {key.removeprefix(f"{path}."): torch.empty_like(t) for key, t in tensors.items() if key.rpartition(".")[0] == path}
        if path in modules and name in KINDS and described(modules[path]) != (name, fields):
            set_module(model, path, plain(own, name, fields))


def _as_json(extra: dict[str, Any]) -> dict[str, Any]:
    """What modules give as extra state, where JSON gives it back as it is.

    Raises:
        FileError: something does not come back.
    """
    for name, value in extra.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise FileError(
                f"save: {name} is a {type(value).__name__} that JSON does not give back as it is, and nothing is pickled; "
                "return plain dicts, lists, numbers and strings, or a tensor, from get_extra_state"
            )
    return extra


def _versioned(tensors: Mapping[str, Any], model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The tensors with the versions that the model's modules write today; some refuse a state without (MNASNet)."""
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def _add_biases(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Folding batch norm gives a bias to layers that had none."""
    for name, module in model.named_modules():
        key = f"{name}.bias" if name else "bias"
        if key in tensors and module._parameters.get("bias", 0) is None:
            module.bias = nn.Parameter(torch.empty_like(tensors[key]))


def _restore_grids(model: nn.Module, saved: Mapping[str, Any]) -> None:
    for name, (bits, axis, *block) in saved.items():
        owner, _, param = name.rpartition(".")
        module = model.get_submodule(owner)
        set_grid(module, param, module.get_buffer(param + SUFFIX), bits, axis, *block)


def _read(path: Path) -> tuple[Header, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileError(f"{path}: there is no such file; give a file that torchopt.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("torchopt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path}: is no whole safetensors file ({_first_line(error)}); it is damaged, or of another kind"
        ) from error
    if text is None:
        raise FileError(f"{path}: was not written by torchopt.save; load it with safetensors.torch.load_file")
    header: Header = json.loads(text)
    if header.get("format") != FORMAT:
        theirs = header.get("format")
        raise FileError(f"{path}: has format {theirs!r}, this torchopt reads format {FORMAT}; use the torchopt that wrote it")
    return header, tensors


def _example(told: Any) -> Any:
    """An input of the shape and type that were saved; what is no tensor, itself."""
    if isinstance(told, Mapping):
        return told["value"]
    shape, dtype = told
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def _plain(value: Any) -> Any:
    """Dataclasses as the mappings that a recipe would hold, fields at their defaults left out."""
    if isinstance(value, type):
        return OwnObserver(kind=value).named() if is_observer(value) else value.__name__
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if not dataclasses.is_dataclass(value):
        return value
    if isinstance(value, OwnObserver):
        return value.named()
    set_fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    name = getattr(type(value), "kind", None)
    kind = {"kind": name} if isinstance(name, str) else {}
    return kind | {name: _plain(v) for name, v in set_fields.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
