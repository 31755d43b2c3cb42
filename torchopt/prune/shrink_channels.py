"""Channels really removed: torch-pruning's dependency graph behind one function.

Removing an output channel of a layer removes it from every tensor coupled to it: its batch norm, the next layer's inputs, and,
through an addition, other layers' outputs (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900).
Attention blocks keep their embedding width, since their heads index into it; their feed-forward layers shrink. A network that the
engine cannot follow as a whole (ShuffleNet's channel shuffle) is shrunk piece by piece: each child module that it can follow keeps
the widths of its own inputs and outputs, and what stayed whole is remembered for the report. Where no piece can be followed either,
the error names the module.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from torchopt.errors import ConfigError, DataError, ModelError, RuleError, nearest
from torchopt.prune.shrink_outputs import Prunable, output_layers
from torchopt.weights import Skipped

# what torch-pruning raises where it cannot follow the channels
UNABLE = (ZeroDivisionError, RuntimeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, TypeError)
NOTE = "torchopt_kept_whole"
IMPORTANCES = ("magnitude", "taylor", "lamp", "fpgm", "bn_scale", "random")


def remove_channels(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    ratio: float,
    *,
    importance: str = "magnitude",
    round_to: int = 8,
    ignore: Sequence[str] = (),
    global_ranking: bool = False,
    isomorphic: bool = False,
    ratios: Mapping[str, float] | None = None,
) -> nn.Module:
    """Return a copy of `model` with about `ratio` of each layer's output channels removed.

    Args:
        model: any network of convolutions, linear layers and norms; for "taylor" with gradients in its parameters' `.grad`.
        example_inputs: the positional arguments of one forward call.
        ratio: fraction of channels to remove, in [0, 1).
        importance: how channels are ranked ("magnitude", "taylor", "lamp", "fpgm", "bn_scale", "random").
        round_to: what remains is a multiple of this.
        ignore: globs of modules whose output channels all stay; those of the layers that make the outputs always do.
        global_ranking: rank the channels of all layers together.
        isomorphic: rank layers of the same shape of dependency together (arXiv:2407.04616).
        ratios: other ratios for some modules, by name.

    Raises:
        RuleError: a glob in `ignore` matches nothing.
        ModelError: the dependency graph cannot be built for the network nor for a part of it.
        DataError: the network does not take the example inputs.
    """
    check_importance(importance)
    _check_ignore(model, ignore)
    small = _copy_with_gradients(model).eval()
    _try(small, example_inputs)
    options = {"importance": importance, "round_to": round_to, "global_pruning": global_ranking, "isomorphic": isomorphic}
    try:
        shrunk = _prune(small, example_inputs, ratio, ignore, "", ratios or {}, options)
        kept: list[Skipped] = []
    except UNABLE as error:
        whole = _copy_with_gradients(model).eval()
        shrunk, kept = _by_pieces(whole, example_inputs, ratio, ignore, ratios or {}, options, error)
    for parameter in shrunk.parameters():
        parameter.grad = None
    shrunk.__dict__[NOTE] = kept + _heads(shrunk)
    return shrunk.train(model.training)


def skipped_of(model: nn.Module) -> list[Skipped]:
    """Return what `remove_channels` kept whole in `model`, and why; nothing for a network that was not shrunk.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2))
        >>> skipped_of(remove_channels(net, (torch.zeros(1, 4),), 0.5))
        []
    """
    return list(model.__dict__.get(NOTE, ()))


def _heads(model: nn.Module) -> list[Skipped]:
    return [
        Skipped(name=name, technique="shrink", reason=f"all {module.num_heads} attention heads stay: they index into its width")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]


def _try(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except RuntimeError as error:
        raise DataError(f"shrink: the network does not take the example inputs: {str(error).splitlines()[0]}") from error


def check_importance(importance: str) -> None:
    """Refuse an unknown way of ranking channels.

    Raises:
        ConfigError: it is none of `IMPORTANCES`.
    """
    if importance not in IMPORTANCES:
        choices = ", ".join(IMPORTANCES)
        raise ConfigError(f"shrink: importance={importance!r}; one of {choices} is needed{nearest(str(importance), IMPORTANCES)}")


def count_macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[int, int]:
    """Return (multiply-adds of one forward call, parameters).

    Example:
        >>> count_macs(nn.Linear(8, 4, bias=False), (torch.zeros(1, 8),))
        (32, 32)
    """
    import torch_pruning

    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs, parameters = torch_pruning.utils.count_ops_and_params(twin, _forward_inputs(example_inputs))
    return int(macs), int(parameters)


def _prune(
    model: nn.Module,
    inputs: tuple[Any, ...],
    ratio: float,
    ignore: Sequence[str],
    prefix: str,
    ratios: Mapping[str, float],
    options: Mapping[str, Any],
) -> nn.Module:
    """Run torch-pruning once over `model`, in place, and check that the result still runs."""
    import torch_pruning

    names = {module: f"{prefix}{name}" for name, module in model.named_modules()}
    kept = [m for m, name in names.items() if any(fnmatchcase(name, pattern) for pattern in ignore)]
    kept += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    kept += output_layers(model, inputs)
    own = {m: _capped(m, ratios.get(name, ratio), options["round_to"]) for m, name in names.items() if isinstance(m, Prunable)}
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            _forward_inputs(inputs),
            importance=_ranking(options["importance"]),
            pruning_ratio=ratio,
            round_to=options["round_to"],
            global_pruning=options["global_pruning"],
            isomorphic=options["isomorphic"],
            ignored_layers=kept,
            pruning_ratio_dict=own,
            in_channel_groups={},  # torch-pruning writes into its default arguments: always give fresh ones
            out_channel_groups={},
            channel_groups={},
            num_heads={},
            customized_pruners={},
        )
        pruner.step()
    with torch.no_grad():
        model(*inputs)
    return model


def _capped(module: nn.Module, ratio: float, round_to: int) -> float:
    """At least one multiple of `round_to` remains; torch-pruning would leave a layer whole rather than round it to nothing."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    channels = weight.shape[1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0]
    return max(0.0, min(ratio, 1.0 - round_to / channels))


def _by_pieces(
    model: nn.Module,
    inputs: tuple[Any, ...],
    ratio: float,
    ignore: Sequence[str],
    ratios: Mapping[str, float],
    options: Mapping[str, Any],
    cause: Exception,
) -> tuple[nn.Module, list[Skipped]]:
    """Shrink every child that the engine can follow on its own, from the outside in; return also what stayed whole."""
    seen = _recorded_inputs(model, inputs)
    pieces: list[str] = []
    failed = ""
    queue = [(name, child) for name, child in model.named_children()]
    while queue:
        name, module = queue.pop(0)
        if name not in seen or sum(isinstance(m, Prunable) for m in module.modules()) < 2:
            continue
        try:
            twin = _prune(_copy_with_gradients(module).eval(), seen[name], ratio, ignore, name + ".", ratios, options)
        except UNABLE:
            failed = name
            queue += [(f"{name}.{inner}", child) for inner, child in module.named_children()]
            continue
        if _width(twin, seen[name]) == _width(module, seen[name]):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, twin)
            pieces.append(name)
    if not pieces:
        where = failed or type(model).__name__
        raise ModelError(
            f"shrink: torch-pruning cannot follow the channels through {where} ({type(cause).__name__}: {cause}); "
            f"leave it out with ignore=[...], or write it without reshaping channels"
        ) from cause
    with torch.no_grad():
        model(*inputs)
    return model, _outside(model, pieces, cause)


def _outside(model: nn.Module, pieces: Sequence[str], cause: Exception) -> list[Skipped]:
    """The layers of no piece; they keep their channels because the network could not be followed as a whole."""
    reason = f"keeps its channels: torch-pruning cannot follow the network as a whole ({type(cause).__name__}), only parts of it"
    return [
        Skipped(name=name, technique="shrink", reason=reason)
        for name, module in model.named_modules()
        if isinstance(module, Prunable) and not any(name.startswith(f"{piece}.") for piece in pieces)
    ]


def _recorded_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """What each submodule is called with in one forward pass."""
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args) and None)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def _width(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(module(*inputs).shape)


def _ranking(importance: str) -> Any:
    import torch_pruning

    kinds = torch_pruning.importance
    makers = {
        "magnitude": lambda: kinds.GroupMagnitudeImportance(p=2),
        "taylor": kinds.GroupTaylorImportance,
        "lamp": kinds.LAMPImportance,
        "fpgm": kinds.FPGMImportance,
        "bn_scale": kinds.BNScaleImportance,
        "random": kinds.RandomImportance,
    }
    return makers[importance]()


def _check_ignore(model: nn.Module, ignore: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RuleError(f"shrink: ignore={pattern!r} matches no module{nearest(pattern, names)}")


def _copy_with_gradients(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.detach().clone()
    return twin.requires_grad_(True)


def _forward_inputs(inputs: tuple[Any, ...]) -> Any:
    return inputs[0] if len(inputs) == 1 else inputs
