"""`export` runs what it wrote and compares: planted faults are refused and named, chaotic rounding and noise are not."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from torchopt import Quantize, Rule, export, one_shot
from torchopt.errors import ModelError
from torchopt.export.difference import apart, close
from torchopt.export.passes import DefaultAttributesPass, KeepApartPass
from torchopt.export.processor import multiplies_exactly, runs_exactly
from torchopt.quantize import static
from torchopt.quantize.layers import kernels

INT8 = [Rule("*", quantize=Quantize(observer="minmax"))]


class Residual(nn.Module):
    """Two convolutions, a sum, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head((x + self.body(x)).mean((2, 3)))


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, x: torch.Tensor, target: str = "ort-x86") -> nn.Module:
    return one_shot(model.eval(), INT8, [x], example_inputs=(x[:1],), target=target, progress=False).eval()


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return quantized(Residual(), data(8, 3, 10, 10))


def planted(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let the last pass change a number too."""
    right = DefaultAttributesPass.call

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        change(model.graph)
        return right(self, model)

    monkeypatch.setattr(DefaultAttributesPass, "call", call)


def scaled(graph: ir.Graph, name: str, factor: float) -> None:
    value = graph.initializers[name]
    value.const_value = ir.tensor((value.const_value.numpy() * np.float32(factor)).astype(np.float32), name=name)


def test_a_kernel_that_is_off_by_one_is_refused_and_named(residual, tmp_path, monkeypatch) -> None:
    right = kernels.FORMULAS["addition"]
    monkeypatch.setitem(kernels.FORMULAS, "addition", lambda grids, out, *values: right(grids, out, *values) + 1)
    path = tmp_path / "m.onnx"
    path.write_text("the old one")
    with pytest.raises(
        ModelError,
        match=r"first result that differs from the same integers is the result of add \(quantizer_\d\): .*by up to 1 steps",
    ):
        export(residual, (data(1, 3, 10, 10),), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "the old one"


def test_a_pass_that_changes_a_number_of_an_integer_file_is_refused(residual, tmp_path, monkeypatch) -> None:
    planted(monkeypatch, lambda graph: scaled(graph, "body.bias", 1.5))
    with pytest.raises(ModelError, match="same integers is the output of body"):
        export(residual, (data(1, 3, 10, 10),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_pass_that_changes_a_number_of_a_float_file_is_refused(tmp_path, monkeypatch) -> None:
    planted(monkeypatch, lambda graph: scaled(graph, "body.bias", 1.01))
    with pytest.raises(ModelError, match="first layer that differs is body"):
        export(Residual().eval(), (data(1, 3, 10, 10),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_on_another_target_it_is_a_warning_with_the_figures(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = quantized(Residual(), data(8, 3, 10, 10), "ort-arm")
    planted(monkeypatch, lambda graph: scaled(graph, "body.bias", 1.5))
    with pytest.warns(
        UserWarning, match=r"up to \d+\.\d\d steps apart, .*% of it more than one.*check its accuracy on the device"
    ):
        export(model, (data(1, 3, 10, 10),), tmp_path / "m.onnx", target="ort-arm")
    assert (tmp_path / "m.onnx").exists()


class Causal(nn.Module):
    """Padding at both ends, the end cut off, and only then a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 8, 3, padding=2), nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)[:, :, :-2]))


def test_two_roundings_that_the_runtime_makes_one_are_kept_apart_and_seen(tmp_path, monkeypatch) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr(static, "lift_activations", lambda traced, layers: None)
    x = torch.randn(8, 4, 24)
    model = quantized(Causal(), x)
    assert "KeepApart" in export(model, (x[:4],), tmp_path / "m.onnx").passes
    monkeypatch.setattr(KeepApartPass, "call", lambda self, graph: ir.passes.PassResult(graph, modified=False))
    with pytest.raises(ModelError, match="ONNX Runtime merges the rounding of"):
        export(model, (x[:4],), tmp_path / "n.onnx")


class Block(nn.Module):
    """A transformer's block: floats between its integers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


def test_chaotic_rounding_between_floats_is_no_fault(tmp_path) -> None:
    """Four blocks amplify single values that round to the other side, until outputs are steps apart: each rounding by itself is right."""
    torch.manual_seed(3)
    model = nn.Sequential(*(Block() for _ in range(4)))
    for p in model.parameters():
        p.data.mul_(2.0)
    x = data(128, 12, 32)
    final = quantized(model, x)
    export(final, (x,), tmp_path / "m.onnx")
    opened = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    with torch.no_grad():
        ours = final(x).numpy()
    theirs = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]
    assert not close(ours, theirs)  # so it was the comparison of single roundings that let it pass


class Noise(nn.Module):
    """A network that draws in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_a_network_that_draws_random_numbers_is_said_not_to_be_compared(tmp_path) -> None:
    with pytest.warns(UserWarning, match="draws random numbers in evaluation, so its file cannot be compared"):
        export(Noise(), (torch.zeros(2, 3),), tmp_path / "m.onnx")


class Counting(nn.Module):
    """Changes a buffer, and asks for random numbers, whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            self.calls += 1
            torch.rand(1)
        return self.layer(x)


def test_random_state_buffers_and_mode_stay_as_they_were(tmp_path) -> None:
    model = Counting().train()
    before = torch.random.get_rng_state()
    export(model, (torch.zeros(1, 3),), tmp_path / "m.onnx")
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    assert model.calls == 0
    assert model.training


class Remembers(nn.Module):
    """Adds a table of one row a sample: it takes two samples, or one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_batch_size_that_the_file_fixed_is_refused(tmp_path, monkeypatch) -> None:
    def fix(graph: ir.Graph) -> None:
        x = graph.inputs[0]
        shape = ir.Value(name="two", const_value=ir.tensor(np.array([1, 3], np.int64), name="two"))
        graph.register_initializer(shape)
        node = ir.Node("", "Reshape", [x, shape])
        node.outputs[0].name, node.outputs[0].dtype = "fixed", x.dtype
        users = list(x.uses())
        graph.insert_before(graph[0], node)
        for user, index in users:
            if user is not node:
                user.replace_input_with(index, node.outputs[0])

    planted(monkeypatch, fix)
    with pytest.raises(ModelError, match=r"does not run the file on inputs of \[2, 3\].*dynamic_batch=False"):
        export(Remembers(), (torch.zeros(1, 3),), tmp_path / "m.onnx")
    export(Remembers(), (torch.zeros(1, 3),), tmp_path / "m.onnx", dynamic_batch=False)


class Unstable(nn.Module):
    """The variance of a constant, which is rounding alone, brought to the scale of the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1.1 - x - x * 0.1
        return y / (y.abs().amax(1, keepdim=True) + 1e-12)


def test_an_output_that_is_rounding_alone_is_no_fault(tmp_path) -> None:
    export(Unstable(), (data(4, 50),), tmp_path / "m.onnx")


def test_equal_infinities_are_equal_and_integers_are_equal_or_not() -> None:
    a = np.array([1.0, np.inf, np.nan, -np.inf])
    np.testing.assert_array_equal(apart(a, a), 0)
    np.testing.assert_array_equal(apart(a, np.array([1.0, -np.inf, 0.0, 5.0])), [0, np.inf, np.inf, np.inf])
    assert close(np.array([3, 4]), np.array([3, 4]))
    assert not close(np.array([3, 4]), np.array([3, 5]))


def test_this_machine_multiplies_exactly_or_says_so() -> None:
    assert runs_exactly("ort-x86") == (runs_exactly("ort-x86-avx2") and multiplies_exactly())
    assert not runs_exactly("ort-arm")
