"""Evaluation rounds as ONNX Runtime's integer kernels do: each formula against the kernel itself, and whole networks bit for bit."""

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize import IntegerKernel
from torchopt.quantize.layers.kernels import (
    Affine,
    addition,
    convolution,
    global_mean,
    hard_sigmoid,
    on_grid,
    product,
    window_mean,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
PLAIN = Quantize(observer="minmax", rounding="nearest", equalize=False)
EVERY = torch.cartesian_prod(torch.arange(256.0), torch.arange(256.0))  # all pairs of codes, (65536, 2)
MICROSOFT = "com.microsoft"


def grid(generator: np.random.Generator, low: float = 0.01, high: float = 0.1) -> Affine:
    scale, zero = generator.uniform(low, high), generator.integers(0, 256)
    return Affine(torch.tensor(scale, dtype=torch.float32), torch.tensor(float(zero)), 0, 255)


def kernel(
    op: str, given: dict[str, np.ndarray], constants: list[np.ndarray | str], domain: str = MICROSOFT, **attributes
) -> np.ndarray:
    """What one node of ONNX Runtime gives; `constants` name the given inputs where they stand."""
    names = [c if isinstance(c, str) else f"c{i}" for i, c in enumerate(constants)]
    held = [(n, np.asarray(c)) for n, c in zip(names, constants, strict=True) if not isinstance(c, str)]
    tensors = [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(c.dtype), c.shape, c.tobytes(), raw=True) for n, c in held]
    inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, x.shape) for n, x in given.items()]
    node = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.UINT8, None)], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[0]


def ends(affine: Affine) -> list[np.ndarray]:
    return [affine.scale.numpy(), np.uint8(affine.zero)]


def codes(q: torch.Tensor) -> np.ndarray:
    return q.clamp(0, 255).numpy().astype(np.uint8)


@pytest.mark.parametrize("seed", range(12))
def test_sums_and_products_of_all_pairs_of_codes(seed):
    random = np.random.default_rng(seed)
    a, b, out = grid(random), grid(random), grid(random)
    wide = Affine(a.scale * b.scale * 150, out.zero, 0, 255)
    given = {"a": codes(EVERY[None, :, 0]).copy(), "b": codes(EVERY[None, :, 1]).copy()}
    values = [(EVERY[None, :, i] - g.zero) * g.scale for i, g in enumerate((a, b))]
    added = kernel("QLinearAdd", given, ["a", *ends(a), "b", *ends(b), *ends(out)])
    assert np.array_equal(codes(addition((a, b), out, *values)), added)
    multiplied = kernel("QLinearMul", given, ["a", *ends(a), "b", *ends(b), *ends(wide)])
    assert np.array_equal(codes(product((a, b), wide, *values)), multiplied)
    assert len(np.unique(added)) > 100
    assert len(np.unique(multiplied)) > 100


@pytest.mark.parametrize("seed", range(8))
def test_means_of_random_codes(seed):
    random = np.random.default_rng(seed)
    into = grid(random)
    out = Affine(into.scale * float(random.uniform(0.2, 0.6)), into.zero, 0, 255)
    q = random.integers(0, 256, (4, 64, 8, 6), dtype=np.uint8)
    x = (torch.tensor(q).float() - into.zero) * into.scale
    whole = kernel("QLinearGlobalAveragePool", {"x": q}, ["x", *ends(into), *ends(out)], channels_last=0)
    assert np.array_equal(codes(global_mean((into,), out, x, x.mean((2, 3), keepdim=True))), whole)
    pooled = kernel("QLinearAveragePool", {"x": q}, ["x", *ends(into), *ends(out)], kernel_shape=[2, 3], strides=[2, 3])
    assert np.array_equal(codes(window_mean((into,), out, torch.nn.functional.avg_pool2d(x, (2, 3)))), pooled)


@pytest.mark.parametrize("seed", range(8))
def test_convolutions_and_hard_gates(seed):
    random = np.random.default_rng(seed)
    into, out = grid(random), grid(random, 0.5, 1.0)
    q = random.integers(0, 256, (2, 32, 12, 12), dtype=np.uint8)
    w, scales = random.integers(-127, 128, (16, 32, 3, 3), dtype=np.int8), random.uniform(1e-3, 1e-2, 16).astype(np.float32)
    bias = random.integers(-9000, 9000, 16, dtype=np.int32)
    constants = ["x", *ends(into), w, scales, np.zeros(16, np.int8), *ends(out), bias]
    theirs = kernel("QLinearConv", {"x": q}, constants, domain="")
    step = (into.scale * torch.tensor(scales)).reshape(1, -1, 1, 1)
    x = (torch.tensor(q).float() - into.zero) * into.scale
    y = torch.conv2d(x, torch.tensor(w) * torch.tensor(scales).reshape(-1, 1, 1, 1), torch.tensor(bias) * step.flatten())
    assert np.array_equal(codes(convolution(y, step, out)), theirs)
    assert len(np.unique(theirs)) > 100

    unit, line = Affine(torch.tensor(1 / 255), torch.tensor(0.0), 0, 255), torch.arange(256.0)[None]
    sixth, one = np.float32(1 / 6) * into.scale.numpy(), [np.float32(0.5), np.uint8(0)]
    gate = kernel("QLinearAdd", {"x": codes(line)}, ["x", sixth, np.uint8(into.zero), np.uint8([[1]]), *one, *ends(unit)])
    assert np.array_equal(codes(hard_sigmoid((into,), unit, (line - into.zero) * into.scale)), gate)


def test_an_activation_in_between_cuts_off_at_its_ends():
    out = Affine(torch.tensor(0.1), torch.tensor(100.0), 0, 255)
    assert on_grid(torch.tensor([0.0, 99.0, 130.0, 300.0]), out, (0.0, 6.0)).tolist() == pytest.approx([0.0, 0.0, 3.0, 6.0])
    assert on_grid(torch.tensor([-5.0, 300.0]), out).tolist() == pytest.approx([-10.0, 15.5])


class Deep(nn.Module):
    """Forty layers: inverted residuals with squeeze-and-excitation, hard gates, ReLU6, a concatenation, pools."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        act = [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.ReLU]
        self.stem = self.layer(3, 16, nn.Hardswish(), stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(self.layer(16, 48, a(), 1), self.layer(48, 48, a(), groups=48), self.layer(48, 16, nn.Identity(), 1))
            for a in act * 3
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Hardsigmoid())
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(32, 10)

    @staticmethod
    def layer(inputs: int, outputs: int, act: nn.Module, kernel: int = 3, **options) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x)) if block is self.blocks[4] else x + block(x)
        x = x * self.gate(x)
        x = torch.cat([x, torch.relu(x)], 1)
        return self.head(self.pool(x).mean((2, 3)))


@pytest.fixture(scope="module")
def deep():
    model, x = Deep(), torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    ready = torchopt.prepare(model.eval(), [Rule("*", quantize=PLAIN)], (x[:1],))
    return torchopt.calibrate(ready, [x], progress=False).eval(), torch.randn(
        32, 3, 32, 32, generator=torch.Generator().manual_seed(1)
    )


def test_forty_layers_on_integers_give_torchs_numbers(deep, tmp_path):
    ready, x = deep
    final = torchopt.finalize(ready).eval()
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.max_steps < 1e-3, str(verdict)  # the last layer adds in float
    assert verdict.top1_agreement == 1.0
    assert not torchopt.inspect(tmp_path / "m.onnx").float


def test_without_the_kernels_they_drift_apart(deep, tmp_path):
    ready, x = deep
    final = torchopt.finalize(ready).eval()
    kernels = [m for m in final.modules() if isinstance(m, IntegerKernel)]
    assert {k.kind for k in kernels} == {"layer", "addition", "product", "global_mean", "window_mean", "hard_sigmoid"}
    with torch.no_grad():
        exact = final(x)
        for module in kernels:
            module.rounding = False
        assert (final(x) != exact).float().mean() > 0.1


def test_prepared_finalized_copied_and_loaded_evaluate_alike(deep, tmp_path):
    ready, x = deep
    final = torchopt.finalize(ready).eval()
    torchopt.save(final, tmp_path / "m.safetensors")
    loaded = torchopt.load(tmp_path / "m.safetensors", Deep()).eval()
    pickled = pickle.loads(pickle.dumps(final))
    with torch.no_grad():
        expected = ready(x)
        for model in (final, copy.deepcopy(ready), copy.deepcopy(final), loaded, pickled):
            assert torch.equal(model(x), expected)


def test_a_copy_computes_with_its_own_grids(deep):
    ready, x = deep
    other = copy.deepcopy(torchopt.finalize(ready)).eval()
    with torch.no_grad():
        before = torchopt.finalize(ready).eval()(x)
        other.quantizer_1.scale.mul_(2)
        assert not torch.equal(other(x), before)
        assert torch.equal(torchopt.finalize(ready).eval()(x), before)


def test_gradients_of_evaluation_are_those_of_the_quantizers(deep):
    ready, x = deep
    final = torchopt.finalize(ready).eval()
    gradients = []
    for rounding in (True, False):
        for module in final.modules():
            if isinstance(module, IntegerKernel):
                module.rounding = rounding
        given = x.clone().requires_grad_()
        final(given).square().sum().backward()
        gradients.append(given.grad)
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.9


def test_training_and_calibration_let_pass(deep):
    ready, x = copy.deepcopy(deep[0]).train(), deep[1]
    seen = []
    for module in ready.modules():
        if isinstance(module, IntegerKernel):
            module.register_forward_hook(lambda module, args, result: seen.append(result is args[0]))
    ready(x)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("dead", ["input", "norm"])
def test_a_bias_fits_into_32_bits_where_nothing_else_is_left(dead, tmp_path):
    """An input that is always 0, or a batch norm that multiplies by almost 0, makes s_x·s_w tiny; the runtime's sum ran over."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, bias=dead == "input")
    net = nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with torch.no_grad():
        if dead == "input":
            first.bias.fill_(-100.0)
        else:
            net[3].weight.fill_(1e-9)
        net[3].bias.uniform_(0.3, 0.6)
    x = torch.randn(8, 3, 8, 8)
    final = torchopt.one_shot(net, [Rule("*", quantize=PLAIN)], [x], example_inputs=(x[:1],), progress=False).eval()
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.weights_equal
    assert verdict.max_steps is None or verdict.max_steps < 1e-3, str(verdict)  # None: the outputs are all alike
    with torch.no_grad():
        assert (final(x) - net(x)).abs().max() < 0.01
