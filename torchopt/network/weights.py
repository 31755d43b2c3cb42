"""The compressible weights of a model: which tensors they are, what they are called, and what stands on them now.

A `Weight` names one tensor by its module and parameter. While a model trains, the tensor that the optimizer sees and the one
that the forward pass uses differ (ŵ = s·T[c], masked by m): a mask moves the leaf to `<param>_orig`
(`torch.nn.utils.prune`), a table moves it to `parametrizations.<param>.original` (`torch.nn.utils.parametrize`).
`Weight.trainable` and `Weight.value` find the two through any such stack, so that no other file needs to know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from torchopt.state.marks import mark, marked

RNN_WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")
IN_PROJECTION = "in_proj"  # the layer that holds an attention's `in_proj_weight` once it is opened for quantization
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A weight that was left alone, by which technique, and why; the report prints it."""

    name: str
    technique: str
    reason: str


NOTE = "_torchopt_skipped"  # of a finalized model: what was left alone on the way, for reports


def note_skipped(model: nn.Module, skipped: Sequence[Skipped]) -> None:
    """Leave a note on a plain model of what was left alone, and why."""
    mark(model, NOTE, tuple(skipped))


def noted(model: nn.Module) -> tuple[Skipped, ...]:
    """Return that note; nothing for a model without one.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> note_skipped(layer, [Skipped(name="weight", technique="prune", reason="frozen")])
        >>> [skip.reason for skip in noted(layer)]
        ['frozen']
    """
    found: tuple[Skipped, ...] = marked(model, NOTE, ())
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """One weight tensor of one module.

    Attributes:
        module_name: dotted path of the owning module in the model ("layer1.0.conv1"; "" for the root).
        module: the owning module itself.
        param: the attribute on it ("weight", "in_proj_weight", "weight_hh_l0").
        kind: "conv", "conv_transpose", "linear", "embedding", "rnn", "attention" or "custom".
        out_axis: the axis of the output channels (1 for transposed convolutions, else 0).
        twins: the other places where the same Parameter is used (tied weights).
    """

    module_name: str
    module: nn.Module = field(repr=False)
    param: str
    kind: str
    out_axis: int = 0
    twins: tuple[Weight, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The parameter's name in the model's own `state_dict`: "layer1.0.conv1.weight"."""
        return f"{self.module_name}.{self.param}" if self.module_name else self.param

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names of the other places where the same Parameter is used."""
        return tuple(twin.name for twin in self.twins)

    @property
    def value(self) -> torch.Tensor:
        """The tensor that forward uses now: mask ⊙ table[code] where both stand."""
        if is_pruned(self.module, self.param):
            masked = getattr(self.module, f"{self.param}_orig") * getattr(self.module, f"{self.param}_mask")
            return masked if isinstance(masked, torch.Tensor) else torch.as_tensor(masked)
        value = getattr(self.module, self.param)
        assert isinstance(value, torch.Tensor)
        return value

    @property
    def trainable(self) -> nn.Parameter:
        """The leaf Parameter that the optimizer sees."""
        leaf = f"{self.param}_orig" if is_pruned(self.module, self.param) else self.param
        if parametrize.is_parametrized(self.module, leaf):
            stack = self.module.parametrizations[leaf]  # type: ignore[index]
            return next(iter(stack._parameters.values()))  # type: ignore[union-attr, return-value]
        return getattr(self.module, leaf)  # type: ignore[no-any-return]

    @property
    def depthwise(self) -> bool:
        """True for a convolution with one input channel a group and more than one group."""
        module = self.module
        return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels


def is_pruned(module: nn.Module, param: str) -> bool:
    """True where a `torch.nn.utils.prune` mask stands on `module.<param>`."""
    leaf = f"{param}_orig"  # not hasattr, which would have a table computed
    return f"{param}_mask" in module._buffers and (leaf in module._parameters or parametrize.is_parametrized(module, leaf))


def weights(model: nn.Module) -> list[Weight]:
    """List the weights that torchopt compresses without being told: conv, linear, embedding, recurrent and attention weights.

    Norms and biases are not listed. A Parameter that several modules share is listed once, at its first place, with the other
    places as `aliases`.

    Example:
        >>> [w.name for w in weights(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)))]
        ['0.weight', '3.weight']
    """
    found: dict[int, Weight] = {}
    for module_name, module in model.named_modules():
        for param, kind in _params(module):
            weight = Weight(module_name=module_name, module=module, param=param, kind=kind, out_axis=_out_axis(module))
            key = id(weight.trainable)
            first = found.get(key, weight)
            found[key] = weight if first.name == weight.name else replace(first, twins=(*first.twins, weight))
    return list(found.values())


def custom_weights(model: nn.Module, *, frozen: bool = False) -> list[Weight]:
    """List the trainable Parameters of two dimensions or more that `weights` does not list: those of anyone's own modules.

    Args:
        model: the network.
        frozen: list those that do not train, too.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
        >>> net.scale = nn.Parameter(torch.ones(2, 2))
        >>> [w.name for w in custom_weights(net)]
        ['scale']
    """
    listed = weights(model)
    known = {id(w.trainable) for w in listed}
    found = []
    for module_name, module in model.named_modules():
        for param, value in module._parameters.items():
            if value is not None and value.dim() > 1 and (frozen or value.requires_grad) and id(value) not in known:
                known.add(id(value))
                found.append(Weight(module_name=module_name, module=module, param=param, kind="custom", out_axis=0))
    return found


def find_weight(model: nn.Module, name: str) -> Weight | None:
    """Return the weight called `name` ("features.0.weight"), also one of a custom module, or None.

    Example:
        >>> find_weight(nn.Sequential(nn.Linear(3, 2)), "0.weight").kind
        'linear'
    """
    module_name, _, param = name.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(module_name)
    if module is None:
        return None
    if param == f"{IN_PROJECTION}_weight" and isinstance(module._modules.get(IN_PROJECTION), nn.Linear):
        return find_weight(model, f"{module_name}.{IN_PROJECTION}.weight" if module_name else f"{IN_PROJECTION}.weight")
    kind = dict(_params(module)).get(param)
    if kind is None and not has_parameter(module, param):
        return None
    return Weight(module_name=module_name, module=module, param=param, kind=kind or "custom", out_axis=_out_axis(module))


def keeps_zeros(module: nn.Module, leaf: str) -> bool:
    """True where something is parametrized on `module.<leaf>`, and gives 0 for each 0 in it."""
    return parametrize.is_parametrized(module, leaf) and all(
        getattr(p, "keeps_zeros", False)
        for p in module.parametrizations[leaf]  # type: ignore[index, union-attr]
    )


def has_parameter(module: nn.Module, param: str) -> bool:
    """True where `module` owns a Parameter `param`, masked, shared or plain."""
    plain = isinstance(module._parameters.get(param), nn.Parameter)
    return plain or is_pruned(module, param) or parametrize.is_parametrized(module, param)


def _params(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (parameter name, kind) of each compressible weight that `module` itself owns."""
    if isinstance(module, nn.RNNBase):
        for name in module._flat_weights_names:
            if name.startswith(RNN_WEIGHTS):
                yield name, "rnn"
    elif isinstance(module, nn.RNNCellBase):
        yield from (("weight_ih", "rnn"), ("weight_hh", "rnn"))
    elif isinstance(module, nn.MultiheadAttention):
        for name in ATTENTION_WEIGHTS:
            if has_parameter(module, name):
                yield name, "attention"
    elif (kind := _weight_kind(module)) and has_parameter(module, "weight"):
        yield "weight", kind


def _weight_kind(module: nn.Module) -> str | None:
    kinds: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
        (_ConvTransposeNd, "conv_transpose"),
        (_ConvNd, "conv"),
        ((nn.Linear, nn.Bilinear), "linear"),
        ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    )
    return next((kind for types, kind in kinds if isinstance(module, types)), None)


def _out_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, _ConvTransposeNd) else 0
