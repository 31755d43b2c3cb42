"""The acceptance items Q1 to Q20 of TensorFlow's toolkit (its tests' own numbers), where they apply to PyTorch and ONNX Runtime.

Where our convention gives another number, the test says which and why, and computes it in numpy. Elsewhere: Q11 (code that the tracer
cannot follow) in test_quantize_dynamic.py, Q12 for every pattern and Q16 (no float between kernels) in test_quantize_patterns.py, the
resume of Q18 in test_quantize_training.py.
"""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.data import Digits
from torchopt.quantize import ActivationQuantizer, FixedQuantize
from torchopt.quantize.layers.activations import START, TRAINING_MOMENTUM, scale_and_zero_point
from torchopt.quantize.layers.weight_grid import weight_scale
from torchopt.quantize.observers import MinMax, MovingAverage
from torchopt.quantize.observers.minmax import MOMENTUM

INT8 = [Rule("*", quantize=Quantize())]
PLAIN = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]


def prepared(net: nn.Module, x: torch.Tensor, rules=PLAIN) -> nn.Module:
    return torchopt.prepare(net, rules, (x[:1],))


def calibrated(net: nn.Module, x: torch.Tensor, rules=PLAIN) -> nn.Module:
    return torchopt.calibrate(prepared(net, x, rules), [x], progress=False).eval()


def ort(path, x: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def train(model: nn.Module, steps: int, shape=(8, 3, 8, 8), lr: float = 0.05) -> nn.Module:
    """SGD on random pictures towards a fixed random answer; the same for every model."""
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.SGD(model.train().parameters(), lr=lr)
    for _ in range(steps):
        y = model(torch.randn(shape, generator=generator))
        optimizer.zero_grad()
        F.mse_loss(y, torch.randn(y.shape, generator=generator)).backward()
        optimizer.step()
        if hasattr(model, "torchopt_state"):
            torchopt.step(model)
    return model


# ---------------------------------------------------------------- Q1 to Q6: observers, rounding, axes, activations
def test_Q1_observers():
    """All values of [-5, 1] and [-1, 5]: (-5, 5). Symmetric [-1, .5]: a weight's narrow grid ±1, a wide one (-1, 127/128).
    Moving average of [-1, 1] then [0, 0]: TensorFlow starts at 0 with 0.999 and has ±0.000999; ours starts at the first batch: ±(1 - c).
    In training it starts at the union of the first ten batches.
    """
    seen, average = MinMax(), MovingAverage()
    for batch in ([-5.0, 1.0], [-1.0, 5.0]):
        seen.observe(torch.tensor(batch))
    assert [float(end) for end in seen.range()] == [-5.0, 5.0]
    np.testing.assert_allclose(127 * float(weight_scale(torch.tensor([-1.0, 0.5]), 127, None)), 1.0, rtol=1e-6)
    scale, zero = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(0.5), -128, 127, symmetric=True)
    assert (-128 * float(scale), 127 * float(scale), int(zero)) == (-1.0, 127 / 128, 0)
    for batch in ([-1.0, 1.0], [0.0, 0.0]):
        average.observe(torch.tensor(batch))
        average.end_batch()
    np.testing.assert_allclose([float(end) for end in average.range()], np.array([-1, 1]) * (1 - MOMENTUM), rtol=1e-6)
    training = ActivationQuantizer().train()
    for batch in (*[[-0.5, 0.1], [0.0, 1.0], [-1.0, 0.3]], *[[0.0, 0.0]] * (START - 2)):
        training(torch.tensor(batch))
    np.testing.assert_allclose(
        [float(training.min_val), float(training.max_val)], np.array([-1, 1]) * (1 - TRAINING_MOMENTUM), rtol=1e-6
    )


@pytest.mark.parametrize("mode", [True, False])
def test_Q2_Q3_eight_bits_on_minus_6_to_6(mode):
    """[-6, -3, 0, .05, .1, 3, 6] with ReLU → [0, 0, 0, .0470590, .0941176, 3.011765, 5.9764705]; softmax of [1, 2] →
    [.27126083, .72873914], whose inputs round to .9882353 and 1.9764706 (21 and 42 steps of 12/255): in training and in evaluation.
    """
    quantizer = ActivationQuantizer()
    quantizer.set_range(torch.tensor(-6.0), torch.tensor(6.0))
    quantizer.disable_observer()
    quantizer.train(mode)
    rounded = torch.relu(quantizer(torch.tensor([-6.0, -3.0, 0.0, 0.05, 0.1, 3.0, 6.0])))
    np.testing.assert_allclose(rounded.numpy(), [0, 0, 0, 0.04705906, 0.09411764, 3.011765, 5.9764705], rtol=1e-5)
    inputs = quantizer(torch.tensor([1.0, 2.0]))
    np.testing.assert_allclose(inputs.numpy(), [0.9882355, 1.9764705], rtol=1e-6)
    np.testing.assert_allclose(torch.softmax(inputs, -1).numpy(), [0.27126083, 0.72873914], rtol=1e-6)


def test_Q4_weights_of_plus_and_minus_one():
    """TensorFlow's ±6 start makes them ±0.9882355; ours is the weight's own largest value, so that they stay ±1."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0]])
    final = torchopt.finalize(calibrated(nn.Sequential(layer), torch.tensor([[0.5, -0.25]])))
    assert final.get_parameter("0.weight").tolist() == [[1.0, -1.0]]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 3), (2, 3, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), (2, 5, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 2), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_Q5_a_scale_an_output_channel_or_one(kind):
    """Length 5 along the output channels, depthwise too (TensorFlow: one for all), each the channel's largest |w| / 127; else a scalar."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    net, x = nn.Sequential(make()), torch.randn(shape)
    w = np.abs(net[0].weight.detach().numpy())
    axis = 1 if kind == "transposed" else 0
    for per_channel, expected in ((True, np.moveaxis(w, axis, 0).reshape(5, -1).max(1) / 127), (False, w.max() / 127)):
        rule = Rule("*", quantize=Quantize(per_channel=per_channel, observer="minmax", rounding="nearest", equalize=False))
        grid = torchopt.network.grid.grids(torchopt.finalize(calibrated(net, x, [rule])))["0.weight"]
        np.testing.assert_allclose(grid.scale.numpy(), expected, rtol=1e-6)
        assert grid.axis == (axis if per_channel else None)


class Cubed(nn.Module):
    """An activation of the user's own."""

    def forward(self, x):
        return x**3


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh(), nn.Softplus(), Cubed()])
def test_Q6_what_no_kernel_computes_is_float_between_two_roundings(activation):
    """GELU is quantized before and after; an unknown activation (an error in TensorFlow) is treated alike."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3)), torch.randn(4, 3, 8, 8)
    ready = calibrated(net, x)
    kinds = [type(m).__name__ for m in (ready.get_submodule(str(n.target)) for n in ready.graph.nodes if n.op == "call_module")]
    assert kinds.count("ActivationQuantizer") == 4  # input, around the activation, output
    error = (ready(x) - net(x)).square().sum() / net(x).square().sum()
    assert error < 1e-3


# ---------------------------------------------------------------- Q7 to Q10: what is prepared
def test_Q7_weights_are_copied():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 8, 8)
    ready = prepared(net, x)
    pairs = zip(net.named_parameters(), ready.named_parameters(), strict=True)
    for (name, theirs), (own, copied) in pairs:
        assert own == name.replace("1.", "0.bn.")  # inside its layer
        assert copied is not theirs
        torch.testing.assert_close(copied, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "rules", "error", "message"),
    [
        ("net", INT8, torchopt.ModelError, "prepare: got 'net' as the model; a torch.nn.Module is needed"),
        (nn.Linear(2, 2), [Quantize()], torchopt.ConfigError, "each must be a torchopt.Rule"),
        (nn.Linear(2, 2), [Rule("conv*", quantize=Quantize())], torchopt.RuleError, "matches no module that owns a weight"),
        (nn.ReLU(), INT8, torchopt.RuleError, "the model has no weights that torchopt compresses"),
    ],
)
def test_Q8_what_cannot_be_prepared(model, rules, error, message):
    with pytest.raises(error, match=message):
        torchopt.prepare(model, rules, (torch.zeros(1, 2),))
    with pytest.raises(torchopt.ConfigError, match=r"Rule.quantize: got 'int8'; torchopt.Quantize"):
        Rule("*", quantize="int8")


def test_Q9_the_users_configuration_beats_the_default():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    final = torchopt.finalize(calibrated(net, x, [Rule("2", quantize=Quantize(weight_bits=4)), *INT8]))
    assert {name: grid.bits for name, grid in torchopt.network.grid.grids(final).items()} == {"0.weight": 8, "2.weight": 4}


@pytest.mark.parametrize(("pattern", "roundings"), [("2", ["1", "2"]), ("0", ["input", "0"])])
def test_Q10_a_part_of_a_network(pattern, roundings):
    """Only the second layer: what it reads is rounded where it is made, and not the network's input. Only the first: both its ends."""
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(4, 3, 8, 8)
    ready = calibrated(net, x, [Rule(pattern, quantize=Quantize())])
    nodes = [n for n in ready.graph.nodes if n.op == "call_module" and "quantizer" in str(n.target)]
    assert [str(n.args[0].target).replace("_", "") for n in nodes] == roundings


# ---------------------------------------------------------------- Q12: rewriting keeps the function
SEPARABLE = {
    "plain": {},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "padding": {"padding": 1},
    "multiplier": {"out_channels": 6},
}


@pytest.mark.parametrize("options", SEPARABLE.values(), ids=SEPARABLE)
def test_Q12_a_separable_convolution_trains_as_in_float(options):
    """Depthwise, then 1×1 with batch norm and ReLU: before rounding starts, 100 steps give the float network's weights within 1e-5."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(**{"in_channels": 3, "out_channels": 3, "kernel_size": 3, "groups": 3, **options})
    net = nn.Sequential(depthwise, nn.Conv2d(depthwise.out_channels, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    ready = torchopt.prepare(
        copy.deepcopy(net), [Rule("*", quantize=Quantize(milestones=[1000] * 3))], (torch.zeros(1, 3, 8, 8),)
    )
    train(net, 100)
    train(ready, 100)
    for name in ("0.weight", "0.bias", "1.weight"):
        torch.testing.assert_close(ready.get_parameter(name), net.get_parameter(name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ready.get_submodule("1").bn.running_var, net[2].running_var, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- Q13, Q14: shared grids, grids that are known
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 4, 1) for _ in range(4))
        self.e = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        inner = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.e(torch.cat([inner, torch.cat([F.relu(self.c(x)), F.relu(self.d(x))], 1)], 1))


def test_Q13_concatenations_and_what_they_join_share_one_quantizer():
    """Nested ones too: four inputs, two inner and the outer concatenation on one grid; with the network's two ends, three grids."""
    torch.manual_seed(0)
    ready = calibrated(Nested(), torch.randn(4, 3, 8, 8))
    calls = [n for n in ready.graph.nodes if n.op == "call_module" and "quantizer" in str(n.target)]
    made = {str(n.args[0].name): str(n.target) for n in calls}
    assert len({made[name] for name in ("a", "b", "c", "d", "cat", "cat_1", "cat_2")}) == 1
    assert len(set(made.values())) == 3


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(0.0, 1.0, 1 / 255, 0), (0.0, 255.0, 1.0, 0), (-127.0, 127.0, 254 / 255, 128), (-1.0, 4.1, 5.1 / 255, 50)],
)
@pytest.mark.parametrize("form", ["calibrated", "set by hand"])
def test_Q14_known_ranges_arrive_in_the_file(low, high, scale, zero_point, form, tmp_path):
    """[0, 1] → 1/255 and [0, 255] → 1.0. Our activations are uint8 without a narrow grid: zero point 0 where TensorFlow's int8 has -128,
    and [-127, 127] has 255 steps of 254/255 with zero at 128 (127.5 rounded to even). Set by hand: in a file of ranges.
    """
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(net[0].weight)
    x = torch.tensor([low, high, low, high]).reshape(1, 1, 2, 2)
    if form == "calibrated":
        ready = calibrated(net, x)
    else:
        torchopt.save_ranges(calibrated(net, torch.randn(1, 1, 2, 2)), tmp_path / "found.json")
        text = (tmp_path / "found.json").read_text()
        for key, value in (("low", low), ("high", high)):
            text = "\n".join(f'"{key}": {value},' if line.strip().startswith(f'"{key}"') else line for line in text.splitlines())
        (tmp_path / "set.json").write_text(text)
        ready = prepared(net, x)
        torchopt.load_ranges(ready, tmp_path / "set.json")
    torchopt.export(torchopt.finalize(ready).eval(), (x,), tmp_path / "m.onnx", pack=False)
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    roundings = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(roundings) == 2  # input and output
    for node in roundings:
        np.testing.assert_allclose(values[node.input[1]], scale, rtol=1e-6)
        assert (values[node.input[2]].dtype, int(values[node.input[2]])) == (np.uint8, zero_point)


def test_Q14_input_and_output_are_set_apart_for_models_of_several_values(tmp_path):
    """Two outputs of their own ranges, 0…1 and 0…255, of an input in 0…1."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x):
            return {"one": self.one(x), "other": self.other(x)}

    net = Two()
    nn.init.ones_(net.one.weight)
    nn.init.constant_(net.other.weight, 255.0)
    final = torchopt.finalize(calibrated(net, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)))
    scales = sorted(float(m.scale) for m in final.modules() if isinstance(m, FixedQuantize))
    np.testing.assert_allclose(scales, [1 / 255, 1 / 255, 1.0], rtol=1e-6)


# ---------------------------------------------------------------- Q15, Q17 to Q20: training and what is deployed
def tiny(first: nn.Module, *rest: nn.Module):
    return lambda: nn.Sequential(first, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


TINY = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3)),
    "conv relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
    "conv bn": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "conv bn relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
    "conv bn relu6": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1)),
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8)),
    "dense bn relu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.ReLU()),
    "max pool": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
    "hardswish": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3)),
    "head": tiny(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
}


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", TINY)
def test_Q15_trained_networks_give_deployed_what_they_gave(name, tmp_path):
    """Within 0.1 for TensorFlow, after training; here within a step of the output's grid (float logits: within 1e-5 of their range)."""
    torch.manual_seed(0)
    ready = train(torchopt.prepare(TINY[name](), INT8, (torch.zeros(1, 3, 8, 8),)), 20)
    final, x = torchopt.finalize(ready).eval(), torch.randn(8, 3, 8, 8)
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    with torch.no_grad():
        ours = final(x).numpy()
        np.testing.assert_allclose(ready.eval()(x).numpy(), ours, rtol=0, atol=1e-6)
    step = max(float(m.scale) for m in final.modules() if isinstance(m, FixedQuantize))
    apart = np.abs(ort(tmp_path / "m.onnx", x)[0] - ours)
    assert apart.max() <= min(0.1, 1.01 * step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "size"), [("inception_v3", 128), ("mobilenet_v2", 64), ("mnasnet1_0", 64)])
def test_Q17_known_networks_train_a_step_and_run(name, size, tmp_path):
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    torch.manual_seed(0)
    ready = torchopt.prepare(torchvision.models.get_model(name, weights=None, **options), INT8, (torch.zeros(1, 3, size, size),))
    before = ready.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    train(ready, 1, (2, 3, size, size), lr=0.001)
    assert any(not torch.equal(v, before[k]) for k, v in ready.state_dict().items() if k.endswith("weight"))
    final, x = torchopt.finalize(ready).eval(), torch.randn(2, 3, size, size)
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    assert np.isfinite(ort(tmp_path / "m.onnx", x)[0]).all()
    assert torchopt.inspect(tmp_path / "m.onnx").float == []


class Odd(nn.Module):
    """What a graph holds beside layers: a clamp around 0, dropout as a function, a residual."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Hardtanh(-0.5, 0.4)

    def forward(self, x):
        y = self.act(self.a(x))
        return self.b(F.dropout(y, 0.5, self.training)) + y


def test_Q18_saved_models_give_the_same(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    ready = calibrated(Odd(), x)
    torchopt.save(ready, tmp_path / "ready.safetensors")
    torchopt.save(torchopt.finalize(ready), tmp_path / "final.safetensors")
    with torch.no_grad():
        expected = ready(x)
        for file in ("ready", "final"):
            again = torchopt.load(tmp_path / f"{file}.safetensors", Odd()).eval()
            torch.testing.assert_close(again(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_functions_follow_the_mode_whatever_it_was_when_prepared(mode):
    torch.manual_seed(0)
    net, x = Odd().train(mode), torch.randn(4, 3, 8, 8)
    ready = calibrated(net, x)
    with torch.no_grad():
        assert torch.equal(ready(x), ready(x))
        final = torchopt.finalize(ready)
        assert torch.equal(final(x), ready(x))
        torch.testing.assert_close(final.eval()(x), net.eval()(x), rtol=0, atol=0.05)
        ready.apply(lambda m: m.disable_observer() if isinstance(m, ActivationQuantizer) else None)
        assert not torch.equal(ready.train()(x), ready(x))


@pytest.mark.parametrize("rectifier", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.Hardswish()])
def test_Q19_an_activation_module_leaves_the_weight_rounded(rectifier):
    """TensorFlow trains a layer before a ReLU module with float weights. 0.3 beside 127 is 0, and trains as 0; 0.6 as 1."""
    net = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), rectifier)
    net[0].weight.data = torch.tensor([127.0, 0.3]).reshape(1, 2, 1, 1)
    x = torch.zeros(1, 2, 1, 2)
    x[0, 1] = 1.0
    ready = torchopt.prepare(net, [Rule("*", quantize=Quantize(rounding="nearest"))], (x,)).train()
    assert ready(x).abs().max() == 0
    net[0].weight.data[0, 1] = 0.6
    assert (
        torchopt.prepare(net, [Rule("*", quantize=Quantize(rounding="nearest"))], (x,)).train()(x).max() > 0.65
    )  # 1, or hardswish(1) = 2/3


def test_Q20_digits_float_trained_and_deployed(tmp_path):
    """Accuracies within 0.2 of one another and above 0.6 for TensorFlow; here within 0.02, above 0.9."""
    found = Digits().load()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    fit(net, found, 6, 0.003)
    ready = fit(torchopt.prepare(net, INT8, (found.test_inputs[:1],)), found, 1, 0.001, torchopt.step)
    final = torchopt.finalize(ready).eval()
    torchopt.export(final, (found.test_inputs[:1],), tmp_path / "m.onnx")
    with torch.no_grad():
        outputs = [
            net(found.test_inputs).numpy(),
            final(found.test_inputs).numpy(),
            ort(tmp_path / "m.onnx", found.test_inputs)[0],
        ]
    scores = [float((y.argmax(1) == found.test_labels.numpy()).mean()) for y in outputs]
    assert min(scores) > 0.9
    assert max(scores) - min(scores) <= 0.02


def fit(model: nn.Module, found, epochs: int, lr: float, step=None) -> nn.Module:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    torch.manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(found.train_inputs)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(found.train_inputs[batch]), found.train_labels[batch]).backward()
            optimizer.step()
            if step is not None:
                step(model)
    return model.eval()


# ---------------------------------------------------------------- bad input
class Log(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.b(torch.log(self.a(x)))


@pytest.mark.parametrize("rules", [INT8, PLAIN])
def test_values_that_are_not_finite_inside_the_network_are_named(rules):
    ready = prepared(Log(), torch.ones(1, 3, 8, 8), rules)
    with pytest.raises(
        torchopt.DataError, match=r"calibrate: the result of log.* is NaN or infinite on this data.*out of the rules"
    ):
        torchopt.calibrate(ready, [torch.randn(4, 3, 8, 8)], progress=False)


@pytest.mark.parametrize("rules", [INT8, PLAIN])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "calibrate: batch 0 holds no sample; leave empty batches out"),
        (
            torch.zeros(2, 5, 8, 8),
            r"does not take batch 0, of shape \[2, 5, 8, 8\]: .*expected input.*give it what forward takes",
        ),
        ("pictures", "batch: got str"),
    ],
)
def test_batches_that_the_network_does_not_take(rules, batch, message):
    ready = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.ones(1, 3, 8, 8), rules)
    with pytest.raises(torchopt.DataError, match=message):
        torchopt.calibrate(ready, [batch], progress=False)


@pytest.mark.parametrize("bits", [8.0, True, "8", 4, 32, None])
def test_bits_of_activations_are_8_or_16(bits):
    with pytest.raises(torchopt.ConfigError, match=r"Quantize.activation_bits: got .*; 8 or 16 is needed"):
        Quantize(activation_bits=bits)
