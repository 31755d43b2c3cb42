"""Networks in which torch and the file gave other numbers: each now gives the same ones, to the last integer."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt import Prune, Quantize, Rule, export, finalize, inspect, one_shot, prepare, step
from torchopt.errors import ModelError
from torchopt.prune import ConstantSparsity

INT8 = Quantize(observer="minmax")


def steps_apart(final: nn.Module, inputs: tuple[torch.Tensor, ...], path) -> float:
    """The largest difference between torch and the file, in steps of 1/255 of an output's range."""
    export(final, tuple(x[:1] for x in inputs), path)
    opened = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        ours = [y.numpy() for y in tree_leaves(final.eval()(*inputs))]
    theirs = opened.run(None, {spec.name: x.numpy() for spec, x in zip(opened.get_inputs(), inputs, strict=True)})
    return max(float(np.abs(a - b).max() / ((a.max() - a.min()) / 255)) for a, b in zip(ours, theirs, strict=True))


def calibrated(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    example = tuple(x[:1] for x in inputs)
    return one_shot(model.eval(), [Rule("*", quantize=INT8)], [inputs], example_inputs=example, progress=False)


def sqnr(model: nn.Module, final: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted, got = model.eval()(x), final.eval()(x)
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum()))


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@pytest.mark.parametrize(
    ("rank", "size", "arguments", "pads"),
    [
        (1, 15, {"kernel_size": 2, "stride": 2}, False),
        (2, 16, {"kernel_size": 3, "stride": 2, "padding": 1}, True),
        (3, 5, {"kernel_size": 2, "stride": 3, "padding": 1}, True),  # the last window would begin in the padding
    ],
)
def test_average_pools_whose_windows_hang_over_the_edge(rank, size, arguments, pads, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, *[size] * rank)
    model = nn.Sequential(CONVS[rank - 1](3, 8, 1), POOLS[rank - 1](**arguments, ceil_mode=True), CONVS[rank - 1](8, 4, 1))
    assert steps_apart(calibrated(model, x), (x,), tmp_path / "m.onnx") < 0.01  # it was 2.6, and 14 dB


def test_average_pools_with_a_divisor_of_their_own(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 2, 1, divisor_override=5), nn.Conv2d(8, 4, 1)).eval()
    assert steps_apart(model, (x,), tmp_path / "m.onnx") < 0.01  # it was 67: the exporter leaves the divisor out
    assert steps_apart(calibrated(model, x), (x,), tmp_path / "q.onnx") < 0.01
    with pytest.raises(ModelError, match="divisor_override and ceil_mode has no form in ONNX"):
        export(nn.Sequential(nn.AvgPool2d(2, divisor_override=3, ceil_mode=True)), (x,), tmp_path / "c.onnx")


class Attention(nn.Module):
    """Causal attention with −∞ in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("mask", torch.full((12, 12), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-2, -1) / 4 + self.mask).softmax(-1) @ v)
        return x + self.down(F.relu(self.up(x)))


def test_causal_attention_keeps_its_mask_and_gets_its_integers(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 12, 16)
    final = calibrated(model, x)  # it was refused: "mask is NaN or infinite"
    assert steps_apart(final, (x,), tmp_path / "m.onnx") < 1
    assert sqnr(model, final, x) > 40
    assert len(inspect(tmp_path / "m.onnx").integer) == 4


class Norms(nn.Module):
    """A batch norm that follows a concatenation, and a recurrent layer that stays float."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, norm = CONVS[rank - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.a, self.b, self.norm, self.c = conv(3, 4, 3), conv(3, 4, 3), norm(8), conv(8, 4, 1)
        self.recurrent, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head(self.recurrent(torch.relu(self.c(y)).flatten(2).transpose(1, 2))[0])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_batch_norm_alone_beside_a_recurrent_layer(rank, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, *[[18], [6, 6], [5, 5, 5]][rank - 1])
    final = calibrated(Norms(rank), x)
    assert steps_apart(final, (x,), tmp_path / "m.onnx") < 0.01  # it was 0.5: torch had no integers there, the file had
    assert len(inspect(tmp_path / "m.onnx").integer) == 5


class Causal(nn.Module):
    """A temporal convolution network: padding at both ends, the end cut off, then the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 16, 3, padding=4, dilation=2), nn.Conv1d(16, 16, 3, padding=8, dilation=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.first(x)[:, :, :-4])
        x = torch.relu(self.second(x)[:, :, :-8])
        return self.head(x[:, :, -1]), x


def trained(model: nn.Module, rule: Rule, *inputs: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """Three steps; the prepared network in evaluation mode, and the final one."""
    ready = prepare(model.train(), [rule], tuple(x[:1] for x in inputs))
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.square().mean() for y in tree_leaves(ready(*inputs))).backward()
        optimizer.step()
        step(ready)
    ready.eval()
    return ready, finalize(ready, unfinished=True).eval()


def test_a_causal_convolution_whose_activation_comes_after_the_cut(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 32)
    rule = Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1)), quantize=INT8)
    ready, final = trained(Causal(), rule, x)
    assert steps_apart(final, (x,), tmp_path / "m.onnx") < 0.01  # it was 2.4, in a tenth of the entries
    assert [m.act is not None for m in ready.modules() if hasattr(m, "act")] == [
        True,
        True,
        False,
    ]  # rounded once, behind the ReLU


class Twice(nn.Module):
    """One tower over two inputs, which have grids of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.tower(a), self.tower(b)], 1))


def test_one_tower_on_two_inputs(tmp_path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 10, 10), 3 * torch.randn(8, 3, 10, 10)
    assert steps_apart(calibrated(Twice(), *inputs), inputs, tmp_path / "m.onnx") < 0.01  # it was 1: the bias, in steps of each


class Flow(nn.Module):
    """Optical flow: neighbours as channels, and the second picture moved by what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.flow, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(80, 2, 3, padding=1),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
        self.register_buffer("grid", torch.stack([columns, rows], -1)[None])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one, other = torch.relu(self.features(a)), torch.relu(self.features(b))
        around = F.unfold(other, 3, padding=1).view(other.shape[0], 72, 8, 8)
        moved = self.grid + self.flow(torch.cat([one, around], 1)).permute(0, 2, 3, 1) * 0.1
        return self.last(F.grid_sample(other, moved, align_corners=True))


def test_neighbours_and_moved_pictures(tmp_path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    assert steps_apart(calibrated(Flow(), *inputs), inputs, tmp_path / "m.onnx") <= 1.001  # it was 8.3
