"""Tracing follows shapes, leaves alone what depends on data, and turns regularizers off in evaluation."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import StochasticDepth

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize.graph.trace import trace
from torchopt.quantize.graph.tracer import EXAMPLE, forget

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
STATIC = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]


class Shapes(nn.Module):
    """Control flow of the kinds that real networks have, all of it on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        if h % 4 or w % 4:
            x = F.pad(x, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4))
        y = self.a(x)
        if y.dim() == 4 and len(y.shape) == 4:
            y = y * 2
        z = self.b(F.max_pool2d(y, 2))
        mask = y.new_zeros(y.shape[-2:])
        mask[:2] = 1
        for size in z.shape[2:]:
            z = z / size
        up = F.interpolate(z, size=y.shape[-2:])
        return torch.cat([y * mask, up], 1)[:, :, :h, :w]


def test_control_flow_on_shapes_is_followed():
    model, x = Shapes().eval(), torch.randn(2, 3, 30, 33)
    traced, leaves = trace(model, (x[:1],))
    assert leaves == []
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)  # another batch
    assert all(node.meta[EXAMPLE].shape[0] == 1 for node in traced.graph.nodes if node.op == "call_module")
    forget(traced.graph)
    assert not any(EXAMPLE in node.meta for node in traced.graph.nodes)


def test_a_network_with_such_control_flow_is_quantized_and_exported(tmp_path):
    model, x = Shapes().eval(), torch.randn(4, 3, 30, 33)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False).eval()
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    assert torchopt.inspect(tmp_path / "m.onnx").float == []
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).within_one_step >= 0.999


def test_tracing_touches_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, (torch.randn(2, 3, 8, 8),))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


class Deep(nn.Module):
    """A residual branch that training drops at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Conv2d(3, 8, 3, padding=1), StochasticDepth(0.5, "row"), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + self.drop(self.b(y))


def test_what_regularizes_training_is_off_in_evaluation(tmp_path):
    x = torch.randn(16, 3, 8, 8)
    ready = torchopt.prepare(Deep().train(), STATIC, (x[:1],))
    torchopt.calibrate(ready, [x], progress=False)
    ready.train()
    assert not torch.equal(ready(x), ready(x))
    ready.eval()
    assert torch.equal(ready(x), ready(x))
    final = torchopt.finalize(ready).eval()
    torch.testing.assert_close(final(x), ready(x), rtol=0, atol=0)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    assert torchopt.inspect(tmp_path / "m.onnx").kernels["QLinearAdd"] == 1


class Marked(nn.Module):
    """A function that a library marks as a leaf hides a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(marked(x, self.layer.weight, self.layer.bias))


def marked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.relu(F.linear(x, weight, bias))


fx.wrap("marked")


def test_a_layer_whose_weight_a_marked_function_reads_is_quantized():
    model, x = Marked().eval(), torch.randn(4, 8)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False)
    assert sorted(torchopt.network.grid.grids(final)) == ["head.weight", "layer.weight"]


class Silenced(nn.Module):
    """swin_v2's attention: the layer's bias, of which the part for the keys is set to zero in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.qkv.bias.clone()
        bias[16:32].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_a_linear_layer_read_with_another_bias_is_an_integer_layer(tmp_path):
    torch.manual_seed(0)
    model, x = Silenced().eval(), torch.randn(8, 4, 16)
    graph, _ = trace(model, (x,))
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    ready = torchopt.calibrate(torchopt.prepare(model, STATIC, (x,)), [x], progress=False)
    final = torchopt.finalize(ready)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    assert torchopt.inspect(tmp_path / "m.onnx").integer == ["qkv.weight", "out.weight"]
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).max_relative < 1e-5
    torch.testing.assert_close(final(x), model(x), rtol=0, atol=0.05 * float(model(x).abs().max()))
    ready.train()(x).square().sum().backward()
    gradient = ready.get_submodule("qkv").bias.grad
    assert float(gradient[16:32].abs().max()) < 1e-6 < float(gradient[:16].abs().max())


class Windows(nn.Module):
    """A marked function writes into the list that it is given, as torchvision's swin3d does with its window."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = clipped([7, 8], [x.shape[1], x.shape[2]])
        return self.head(self.layer(x).reshape(-1, window[0], window[1]).mean(1))


def clipped(window: list[int], size: list[int]) -> list[int]:
    for i in range(2):
        if size[i] <= window[i]:
            window[i] = size[i]
    return window


fx.wrap("clipped")


def test_a_marked_function_may_write_into_a_list(tmp_path):
    model, x = Windows().eval(), torch.randn(4, 3, 8)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False)  # walks, with the default corrections
    torch.testing.assert_close(final(x), model(x), rtol=0.1, atol=0.05)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).max_relative < 1e-5
    assert torchopt.inspect(tmp_path / "m.onnx").float == []


class Optional(nn.Module):
    """An argument that is a mask or None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.layer(x)
        return y if mask is None or not isinstance(mask, torch.Tensor) else y * mask.float()


class Strict(Optional):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise TypeError("a mask must be a tensor")
        return self.layer(x)


@pytest.mark.parametrize("cls", [Optional, Strict])
def test_an_optional_argument_may_be_left_out(cls):
    model, x = cls().eval(), torch.randn(4, 8)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x[:1],), progress=False)
    torch.testing.assert_close(final(x), model(x), rtol=0.1, atol=0.05)


class Unused(nn.Module):
    """One layer that the forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_the_forward_does_not_use_is_reported():
    ready = torchopt.prepare(Unused(), STATIC, (torch.randn(1, 8),))
    assert [s.name for s in ready.torchopt_state.skipped] == ["spare"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(torch.relu(self.conv(x)).transpose(1, 2))[0])


def test_a_recurrent_layer_on_a_graph_keeps_integer_weights(tmp_path):
    x = torch.randn(4, 4, 12)
    ready = torchopt.prepare(Recurrent(), STATIC, (x[:1],)).eval()
    assert {s.name: s.reason for s in ready.torchopt_state.skipped} == {
        "lstm": "the graph shows no layer of a known class; its weights are integers, its activations stay float, "
        "as with mode='weight_only'"
    }
    torchopt.calibrate(ready, [x], progress=False)
    final = torchopt.finalize(ready).eval()
    assert {"conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"} == set(torchopt.network.grid.grids(final))
    torch.testing.assert_close(final(x), ready(x), rtol=0, atol=0)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).weights_equal


class Normed(nn.Module):
    """Cannot be followed, and has a batch norm that only a graph could fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * float(x.shape[2])


def test_an_untraceable_model_whose_batch_norms_need_a_graph_is_refused():
    with pytest.raises(torchopt.ModelError, match=r"Normed depends on data and cannot be traced.*float\(x\.shape\[2\]"):
        torchopt.prepare(Normed(), STATIC, (torch.randn(1, 3, 8, 8),))


class Mine(nn.Conv2d):
    """A layer of one's own that computes as torch's does, as torchvision's video networks have them."""

    def __init__(self, inputs: int, outputs: int, note: str = "") -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.note = note


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_that_leaves_forward_alone_is_the_layer_that_it_extends(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(Mine(3, 16), nn.BatchNorm2d(16), nn.ReLU(), Mine(16, 8, "last"))
    x = torch.randn(4, 3, 8, 8)
    final = torchopt.one_shot(net, [torchopt.Rule("*", quantize=torchopt.Quantize())], [x], example_inputs=(x,), progress=False)
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    assert len(torchopt.inspect(tmp_path / "m.onnx").integer) == 2
    assert torchopt.verify(final, tmp_path / "m.onnx", [x]).max_steps <= 1


def test_one_that_does_not_is_no_such_layer():
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(Scaled(3, 4, 3), nn.Conv2d(4, 4, 3))
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize())], example_inputs=(x,))
    assert torch.allclose(ready.eval()(x), net(x), atol=0.05), "its factor is not lost"
