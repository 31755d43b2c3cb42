"""Cross-layer equalization: give the channels of the tensors between layers equal ranges (Nagel et al. 2019, arXiv:1906.04721, §4.1).

    y = W₂·f(W₁x + b₁)  =  W₂S⁻¹·f(S·W₁x + S·b₁)        f(s·x) = s·f(x),  s > 0:  none, ReLU, sums, pooling

An activation has one scale for the whole tensor: a channel whose values stay at a hundredth of the largest gets two or three of the 256
integers. Weights have a scale per output channel, so that the rows of W₁ may be multiplied freely; what is traded is the range aᵢ of
channel i against the column of W₂ that reads it, wᵢ relative to the largest weights of its rows:  sᵢ ∝ √(wᵢ / aᵢ), and ∝ 1 / aᵢ where
only depthwise layers read it, whose rows have one column. A group is all tensors that must share S, as those along a residual stream.

ReLU6 is not homogeneous. Its channels are only enlarged, until the largest value that calibration sees reaches 6: below that the
function is the same, above it saturates where the range of the rounding ends anyway, and the layer still runs as one integer kernel.

That the function stays is proved: on samples spread over the data, the network with its rounding off gives what it gave before. Groups
that break this are left as they were. A layer is left out beforehand where another module, or the graph itself, reads its parameters.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import DataError, ModelError
from torchopt.network.proof import TOLERANCE, Run, difference, run
from torchopt.network.surgery import module_of
from torchopt.network.weights import Weight
from torchopt.quantize.calibration.agreement import largest_part
from torchopt.quantize.calibration.batch_slices import Call, spread
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.calibration.proving import as_float
from torchopt.quantize.corrections.walk import holds_table, ordered, rounding
from torchopt.quantize.graph.fuse import ends_of
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.kernels import IntegerKernel
from torchopt.quantize.layers.modules import Fused

KEEP_MODULES = (
    ActivationQuantizer, nn.Dropout, nn.Dropout2d, nn.Identity, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
)  # fmt: skip
KEEP_FUNCTIONS = {
    operator.add, operator.iadd, torch.add, torch.relu, F.relu, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    torch.flatten, torch.mean,
}  # fmt: skip
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
KEEP_METHODS = {"add", "add_", "relu", "relu_", "mean", "flatten"}
PROOF = 8  # samples that the network is compared on
HALF = 0.5  # of the inequality goes to the activation, the other half to the weights that read it (Xiao et al. 2022, arXiv:2211.10438)


@dataclass(kw_only=True, eq=False)
class Group:
    """Tensors that share S: who makes them, who reads them, and the largest |value| of each channel."""

    makers: list[Fused] = field(default_factory=list)
    readers: list[Fused] = field(default_factory=list)
    peak: torch.Tensor | None = None
    fixed: bool = False

    @property
    def whole(self) -> bool:
        """True where all is known that scaling needs."""
        return not self.fixed and bool(self.makers) and bool(self.readers) and self.peak is not None


@torch.no_grad()
def equalize(model: nn.Module, calls: Sequence[Call]) -> int:
    """Scale the channels of every group of tensors whose layers ask for it, in place; the float function stays.

    Args:
        model: what `attach` returned for static quantization.
        calls: the samples, as arguments of the model.

    Returns:
        How many groups were equalized.

    Raises:
        ModelError: the model has no graph.
        DataError: an activation is not finite.
    """
    if not isinstance(model, fx.GraphModule):
        raise ModelError(f"equalize: {type(model).__name__} is not a traced model; use mode='static'")
    peaks, few = Peaks(model), spread(calls, PROOF)
    before = [run(model, call, under=as_float) for call in few]
    with rounding(model, enabled=False), folded_once(model.modules()):
        for args in ordered(model, calls):
            peaks.run(*args)
    wanted = [group for group in groups(model, peaks.found) if group.whole]
    for group in wanted:
        _check_finite(model, group)
    return _proved(model, wanted, few, before)


def _proved(model: nn.Module, wanted: list[Group], calls: Sequence[Call], before: Sequence[Run]) -> int:
    """Scale the groups with which the outputs stay as they were `before`; return how many."""
    scales = {group: factors(group) for group in wanted}
    originals = [(tensor, tensor.clone()) for tensor in _touched(wanted)]

    def stands(some: list[Group]) -> bool:
        for tensor, original in originals:
            tensor.copy_(original)
        for group in some:
            _scale(group, scales[group])
        for layer in _layers(wanted):
            _see(layer)
        now = (run(model, call, under=as_float) for call in calls)
        return all(difference(was, is_now) <= TOLERANCE for was, is_now in zip(before, now, strict=True))

    kept = largest_part(wanted, stands)
    if len(kept) < len(wanted):
        stands(kept)  # the last trial may have been another
    return len(kept)


def _layers(wanted: list[Group]) -> list[Fused]:
    return list(dict.fromkeys(layer for group in wanted for layer in (*group.makers, *group.readers)))


def _touched(wanted: list[Group]) -> list[torch.Tensor]:
    """All tensors that scaling may write into."""
    found = {id(t): t for layer in _layers(wanted) for t in (*layer.parameters(), *layer.buffers())}
    return list(found.values())


def _check_finite(model: nn.Module, group: Group) -> None:
    """Refuse factors from NaN or infinity; elsewhere both are the network's own affair, such as −∞ in a mask.

    Raises:
        DataError: they are there.
    """
    if group.peak is not None and not bool(torch.isfinite(group.peak).all()):
        maker = next(name for name, module in model.named_modules() if module is group.makers[0])
        raise DataError(
            f"calibrate: the output of {maker} is NaN or infinite on this data; clean it, or leave the layers around it out of the rules"
        )


class Peaks(fx.Interpreter):
    """Runs the graph, and keeps the largest |value| of each channel (axis 1) of each tensor."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.found: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at what it gives."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.dim() > 2 and _is_linear(self.module, n):  # its channels are the last axis
            for node in (n, *n.all_input_nodes):
                self.found.pop(node, None)
            return value
        if n.op != "output" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            rows = value.movedim(1, -1).flatten(0, -2)  # a view where channels are last
            peak = torch.maximum(rows.amax(0), -rows.amin(0))
            before = self.found.get(n)
            self.found[n] = peak if before is None or before.shape != peak.shape else torch.maximum(before, peak)
        return value


def groups(model: fx.GraphModule, peaks: dict[fx.Node, torch.Tensor]) -> list[Group]:
    """Return the groups in the order of the graph; those that anything else touches are marked fixed."""
    of: dict[fx.Node, Group] = {}
    calls = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
    shared = read_elsewhere(model)
    for node in model.graph.nodes:
        module = module_of(model, node)
        group = of[node] = Group(peak=peaks.get(node))
        if isinstance(module, Fused) and calls[node.target] == 1 and _takes_part(module, shared):
            group.makers.append(module)
            of[node.all_input_nodes[0]].readers.append(module)
            group.fixed = module.bn is not None and module.bn.weight is None
        elif isinstance(module, IntegerKernel):
            of[node] = of[node.args[0]]
        elif _keeps(model, node) and all(_same_channels(peaks, node, s) for s in node.all_input_nodes):
            for source in node.all_input_nodes:
                _join(of, node, source)
        else:
            for touched in (node, *node.all_input_nodes):
                of[touched].fixed = True
    return list(dict.fromkeys(of.values()))


def factors(group: Group) -> torch.Tensor:
    """Return S of a group, one factor a channel: 1 for channels that are always zero."""
    assert group.peak is not None
    a = group.peak / group.peak.max()
    columns = torch.stack([_columns(reader) for reader in group.readers]).amax(0)
    free = all(reader.weight.shape[1] == 1 for reader in group.readers)
    s = 1 / a if free else (columns / a) ** HALF
    s = torch.where((a > 0) & (columns > 0), s, 0.0)
    s = s / (a * s).max()
    top = min((_top(maker) for maker in group.makers), default=math.inf)
    if top < math.inf:
        s = torch.minimum(s, top / group.peak.clamp(min=1e-30)).clamp(min=1)
    return torch.where((a > 0) & (columns > 0), s, 1.0)


def _columns(reader: Fused) -> torch.Tensor:
    """The largest |w| that reads each input channel, relative to the largest of its row."""
    rows = reader.weight.abs().flatten(2) if reader.weight.dim() > 2 else reader.weight.abs()[:, :, None]  # (out, in, kernel)
    rows = rows.amax(2) / rows.amax((1, 2), keepdim=False).clamp(min=1e-30)[:, None]
    split = getattr(reader, "groups", 1)
    return rows.reshape(split, -1, rows.shape[1]).amax(1).flatten()


def _scale(group: Group, s: torch.Tensor) -> None:
    for maker in group.makers:
        if maker.bn is not None:
            maker.bn.weight.mul_(s)  # type: ignore[operator, union-attr]
            maker.bn.bias.mul_(s)  # type: ignore[operator, union-attr]
        else:
            _multiply(maker, s.reshape(-1, *[1] * (maker.weight.dim() - 1)))
            if maker.bias is not None:
                maker.bias *= s
    for reader in group.readers:
        split, inner = getattr(reader, "groups", 1), reader.weight.shape[1]
        each = s.reshape(split, 1, inner).expand(-1, len(reader.weight) // split, -1)  # (groups, out of a group, in of a group)
        _multiply(reader, 1 / each.reshape(len(reader.weight), inner, *[1] * (reader.weight.dim() - 2)))


def _multiply(layer: Fused, factor: torch.Tensor) -> None:
    """Multiply what stands under the layer's weight."""
    weight = Weight(module_name="", module=layer, param="weight", kind="custom")
    weight.trainable.mul_(factor)


def _see(layer: Fused) -> None:
    """After its parameters were written: what a mask shows of the weight, and where a learned scale starts."""
    weight = Weight(module_name="", module=layer, param="weight", kind="custom")
    if weight.trainable is not layer.weight:
        layer.weight = weight.value
    layer.restart_scale()


def _is_linear(model: nn.Module, node: fx.Node) -> bool:
    return isinstance(module_of(model, node), nn.Linear)


def _takes_part(layer: Fused, shared: set[int]) -> bool:
    free = layer.out_axis == 0 and not isinstance(layer, nn.Embedding) and not holds_table(layer)
    return layer.config.equalize and free and shared.isdisjoint(p.data_ptr() for p in layer.parameters())


def read_elsewhere(model: fx.GraphModule) -> set[int]:
    """Return the addresses of parameters that several modules hold (tied weights), or that the graph reads by itself."""
    held = Counter(p.data_ptr() for module in model.modules() for p in module._parameters.values() if p is not None)
    read = {str(node.target) for node in model.graph.find_nodes(op="get_attr")}
    by_graph = {p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False) if name in read}
    return {address for address, count in held.items() if count > 1 and address} | by_graph


def _top(layer: Fused) -> float:
    """Up to where the activation of a layer is homogeneous."""
    if layer.act is None:
        return math.inf
    low, high = ends_of(layer.act)
    return min(-low, high) if low else high


def _keeps(model: fx.GraphModule, node: fx.Node) -> bool:
    """True where f(s·x) = s·f(x), channel by channel."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return isinstance(module, KEEP_MODULES) and not isinstance(module, nn.ReLU6)
    known = KEEP_FUNCTIONS if node.op == "call_function" else KEEP_METHODS if node.op == "call_method" else ()
    sums = node.target in SUMS
    return node.target in known and (not sums or (len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs))


def _same_channels(peaks: dict[fx.Node, torch.Tensor], node: fx.Node, source: fx.Node) -> bool:
    return node in peaks and source in peaks and peaks[node].shape == peaks[source].shape


def _join(of: dict[fx.Node, Group], node: fx.Node, source: fx.Node) -> None:
    """Put two groups together under the earlier one."""
    one, other = of[source], of[node]
    if one is other:
        return
    assert one.peak is not None
    assert other.peak is not None
    one.makers += other.makers
    one.readers += other.readers
    one.peak, one.fixed = torch.maximum(one.peak, other.peak), one.fixed or other.fixed
    for member in [n for n, group in of.items() if group is other]:
        of[member] = one
