"""Put tables on weights, keep their codes fresh while training, and take them off again.

A weight that a mask stands on is parametrized under it, on `<param>_orig`, and entry 0 of its table is 0 and stays 0: masked weights
use it. Zero is pinned too where zeros are found in the weights and are to be preserved. A weight that an earlier round has left with
few distinct values keeps exactly those. Taking off is our own: torch's `remove_parametrizations` deletes the attribute from a class that
deep copies share, and so destroys the original of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from torchopt.cluster.config import Cluster
from torchopt.cluster.fit import tables
from torchopt.cluster.shared import COUNT_EVERY, SharedWeights
from torchopt.cluster.straight import grid_scale
from torchopt.errors import ModelError, RuleError
from torchopt.network.computed import can_be_pickled, cannot_be_assigned, show, uncompute
from torchopt.network.grid import set_grid
from torchopt.network.weights import Skipped, Weight, is_pruned, keeps_zeros
from torchopt.state.marks import mark, marked

POSITION = "_torchopt_position"  # of a weight among its module's parameters, kept on the list of its parametrizations


def attach(
    pairs: Sequence[tuple[Weight, Cluster]], *, preserve: bool, importance: Mapping[str, Tensor] | None = None
) -> list[Skipped]:
    """Put a table on each weight, in place.

    Args:
        pairs: weights and what to do with them, in the model's order.
        preserve: keep the zeros and the few distinct values that are found in the weights.
        importance: masses for k-means by weight name, of the weights' shapes (squared gradients); a weight without counts evenly.

    Returns:
        The weights that were left alone, and why.

    Raises:
        ModelError: a weight holds NaN or infinity, or something else is parametrized on it.
        RuleError: no weight at all could be clustered.

    Example:
        >>> from torchopt.network.weights import weights
        >>> layer = nn.Linear(8, 8)
        >>> attach([(weights(layer)[0], Cluster(n_clusters=4))], preserve=True)
        []
        >>> len(layer.weight.unique())
        4
    """
    skipped: list[Skipped] = []
    for number, (weight, config) in enumerate(pairs):
        first = all(other is not config for _, other in pairs[:number])
        reason = _unfit(weight, config, first=first) or _put_on(weight, config, preserve, (importance or {}).get(weight.name))
        if reason:
            skipped.append(Skipped(name=weight.name, technique="cluster", reason=reason))
    if skipped and len(skipped) == len(pairs):
        raise RuleError(
            f"{skipped[0].name}: cluster has nothing to act on: {skipped[0].reason}; change the rule, or leave it out"
        )
    return skipped


def update(model: nn.Module, step: int) -> bool:
    """After optimizer step `step` (from 1): find the nearest entry of each weight anew where it is due; True if a table stands."""
    tables = {id(shared): (weight, shared) for weight, shared in shared_weights(model)}
    for weight, shared in tables.values():
        shared.evaluations = 0
        if shared.config.soft_until:
            shared.softness.fill_(max(0, shared.config.soft_until - step))
        turn, late = divmod(step, shared.config.frequency)
        if not late:
            _refresh(weight, shared)
            if turn % COUNT_EVERY == 0:
                shared.recount()
        elif (mask := _mask(weight)) is not None:
            shared.mask_(mask)  # weights masked since the last turn
    return bool(tables)


def soft_until(model: nn.Module) -> int:
    """Return the optimizer step until which some table of `model` is soft, 0 where none is."""
    return max((shared.config.soft_until for _, shared in shared_weights(model) if shared.soft), default=0)


def _refresh(weight: Weight, shared: SharedWeights) -> None:
    try:
        shared.refresh(weight.trainable)
    except ModelError as error:
        raise ModelError(f"{weight.name}: {error}") from None


def bake(model: nn.Module) -> None:
    """Replace each shared weight by an ordinary Parameter with the values that forward uses, in place."""
    for weight, shared in reversed(list(shared_weights(model))):  # the last one put on finds its place among the others first
        with torch.no_grad():
            leaf = weight.trainable
            leaf.copy_(shared.render())
            if shared.config.table_bits is not None:
                _record_grid(weight, shared, shared.config.table_bits)
        _strip(weight.module, _leaf_name(weight), leaf)


def table_of(weight: Weight) -> Tensor | None:
    """Return the table of a weight as forward uses it, (groups, k), or None where it has none."""
    shared = _shared_of(weight.module, _leaf_name(weight))
    return None if shared is None else shared.values().detach().clone()


def shared_weights(model: nn.Module) -> Iterator[tuple[Weight, SharedWeights]]:
    """Yield each weight that a table stands on, with its parametrization; tied ones at each of their places."""
    for module_name, module in model.named_modules():
        stacks = module._modules.get("parametrizations")
        for leaf in list(stacks or ()):  # type: ignore[arg-type]
            shared = _shared_of(module, leaf)
            if shared is not None:
                param = leaf.removesuffix("_orig") if is_pruned(module, leaf.removesuffix("_orig")) else leaf
                yield Weight(module_name=module_name, module=module, param=param, kind="shared", out_axis=shared.out_axis), shared


def _unfit(weight: Weight, config: Cluster, *, first: bool) -> str | None:
    """Why a weight should not have a table at all, or None."""
    if weight.depthwise and not config.include_depthwise:
        return "depthwise (include_depthwise=False)"
    if config.skip_first and first:
        return "first of the matched layers (skip_first=True)"
    if parametrize.is_parametrized(weight.module, _leaf_name(weight)):
        raise ModelError(
            f"{weight.name}: parametrized already; remove that parametrization, or call torchopt.finalize(model), first"
        )
    if not bool(torch.isfinite(weight.trainable).all()):
        raise ModelError(f"{weight.name}: holds NaN or infinity; a trained, finite model is needed")
    return None if weight.trainable.requires_grad else "frozen (requires_grad=False)"


def _put_on(weight: Weight, config: Cluster, preserve: bool, importance: Tensor | None) -> str | None:
    """Find the table and parametrize; or return why not."""
    value, mask = weight.trainable.detach(), _mask(weight)
    pinned = mask is not None or (preserve and bool((value == 0).any()))
    fitted = tables(value, mask, config, out_axis=weight.out_axis, pinned=pinned, preserve=preserve, importance=importance)
    if isinstance(fitted, str):
        return fitted
    codes = torch.zeros(len(fitted), value.numel() // len(fitted), dtype=torch.uint8, device=value.device)
    shared = SharedWeights(config, fitted, codes, value.shape, out_axis=weight.out_axis, pinned=pinned)
    shared.refresh(value if mask is None else value * mask)
    shared.recount()
    for place in (weight, *weight.twins):
        _register(place, shared)
    return None


@torch.no_grad()
def refit(model: nn.Module, importance: Mapping[str, Tensor] | None = None) -> None:
    """Find every table anew, from the weights that masks leave now, and weighed by what is known of their importance, in place.

    Args:
        model: holds tables put on by `attach`, or none.
        importance: masses for k-means by weight name, of the weights' shapes; a weight without counts evenly.
    """
    for weight, shared in {id(shared): (weight, shared) for weight, shared in shared_weights(model)}.values():
        value, mask, masses = weight.trainable.detach(), _mask(weight), (importance or {}).get(weight.name)
        if mask is not None and not bool(mask.any()):
            continue
        room, pinned = shared.table.shape[1], shared.pinned
        fitted = tables(
            value, mask, shared.config, out_axis=shared.out_axis, pinned=pinned, preserve=True, importance=masses, room=room
        )
        assert not isinstance(fitted, str)
        last = fitted[:, -1:].expand(-1, shared.table.shape[1] - fitted.shape[1])
        shared.table.copy_(torch.cat((fitted, last), 1))
        shared.refresh(value if mask is None else value * mask)
        shared.recount()


def _register(weight: Weight, shared: SharedWeights) -> None:
    """Parametrize one of the places where a Parameter is used; tied ones have one parametrization in common."""
    module, leaf = weight.module, _leaf_name(weight)
    position = list(module._parameters).index(leaf)
    parametrize.register_parametrization(module, leaf, shared, unsafe=True)
    can_be_pickled(module)
    cannot_be_assigned(module, leaf)
    mark(module.parametrizations[leaf], POSITION, position)  # type: ignore[arg-type, index]
    shared.train(module.training)
    if leaf != weight.param and not isinstance(module, nn.RNNBase | NonDynamicallyQuantizableLinear):
        show(
            module, weight.param, _masked
        )  # whoever reads it; an RNN keeps its own list, and attention's projection has its property
    if isinstance(module, nn.RNNBase) and _mask(weight) is None:
        module.register_forward_pre_hook(_publish)
        module.register_forward_hook(_withdraw, always_call=True)
        _withdraw(module)


def _masked(module: nn.Module, param: str) -> Tensor:
    """The shared values under the mask, as forward uses them, with their gradient."""
    value: Tensor = getattr(module, f"{param}_orig")
    if keeps_zeros(module, f"{param}_orig"):
        return value
    return torch.where(module._buffers[f"{param}_mask"], value, torch.zeros((), dtype=value.dtype, device=value.device))  # type: ignore[arg-type]


def _record_grid(weight: Weight, shared: SharedWeights, bits: int) -> None:
    scale = grid_scale(shared.table, bits)[:, 0]
    if len(scale) == 1:
        set_grid(weight.module, weight.param, scale[0], bits, None)
        return
    set_grid(weight.module, weight.param, scale.repeat_interleave(shared.config.channels_per_table), bits, weight.out_axis)


def _strip(module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """Take the parametrization of `leaf` off this module only, and put the Parameter back in its place among the others."""
    stacks = module.parametrizations
    assert isinstance(stacks, nn.ModuleDict)
    uncompute(module, leaf, parameter, marked(stacks[leaf], POSITION))
    if isinstance(module, nn.RNNBase):
        _remove_hooks(module)


def _publish(module: nn.Module, inputs: object) -> None:
    """Before an RNN's forward: give it the shared weights, as it keeps its own list of them."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _withdraw(module: nn.Module, *_: object) -> None:
    """After an RNN's forward: leave leaves in its list, as tensors that have a history cannot be copied or saved."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [_leaf(module, name) for name in module._flat_weights_names]


def _leaf(module: nn.Module, name: str) -> Tensor:
    shared = _shared_of(module, name)
    return getattr(module, name) if shared is None else module.parametrizations[name].original  # type: ignore[no-any-return, index, union-attr]


def _remove_hooks(module: nn.RNNBase) -> None:
    """Take one pair of hooks off an RNN; once the last weight is plain, its list is of Parameters again."""
    for hooks, ours in ((module._forward_pre_hooks, _publish), (module._forward_hooks, _withdraw)):
        key = next((key for key, hook in hooks.items() if hook is ours), None)
        if key is not None:
            del hooks[key]  # type: ignore[attr-defined]
            module._forward_hooks_always_called.pop(key, None)
    module._flat_weights = [_leaf(module, name) for name in module._flat_weights_names]
    module.flatten_parameters()


def _leaf_name(weight: Weight) -> str:
    return f"{weight.param}_orig" if is_pruned(weight.module, weight.param) else weight.param


def _mask(weight: Weight) -> Tensor | None:
    return weight.module._buffers.get(f"{weight.param}_mask")


def _shared_of(module: nn.Module, leaf: str) -> SharedWeights | None:
    if not parametrize.is_parametrized(module, leaf):
        return None
    stack = module.parametrizations[leaf]  # type: ignore[index]
    last = stack[-1]  # type: ignore[index, operator]
    return last if isinstance(last, SharedWeights) else None
