"""Equalization, adaptive rounding and bias correction: what each promises, in numbers."""

import copy

import pytest
import torch
from torch import nn

import torchopt
from torchopt import ConfigError, DataError, ModelError, Quantize, Rule
from torchopt.quantize.calibration.batch_slices import kept
from torchopt.quantize.corrections.adaptive import Problem, learn
from torchopt.quantize.corrections.bias import mean_shift
from torchopt.quantize.corrections.columns import Columns, columns
from torchopt.quantize.corrections.equalize import Peaks, equalize
from torchopt.quantize.corrections.reach import choose_reach, hold
from torchopt.quantize.corrections.walk import rounding, walk
from torchopt.quantize.layers.float_layers import FusedConv2d, FusedLinear
from torchopt.quantize.layers.modules import Fused


def small_net():
    """A convolution, a depthwise one, a pointwise one and a linear layer; channels of unequal range."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    for i in (1, 4):
        nn.init.uniform_(net[i].bias, -0.5, 0.5)
        nn.init.uniform_(net[i].weight, 0.02, 1.0)
        nn.init.uniform_(net[i].running_mean, -0.3, 0.3)
    return net


DATA = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))


PLAIN = {"observer": "moving_average", "rounding": "nearest", "equalize": False, "bias_correction": False}


def prepared(net, data=DATA, **config):
    return torchopt.prepare(net, [Rule("*", quantize=Quantize(**{**PLAIN, **config}))], (data[:1],)).eval()


def calibrated(net, data=DATA, **config):
    return torchopt.calibrate(prepared(net, data, **config), data.split(16), progress=False)


def calls(data):
    return [((batch,), {}) for batch in data.split(16)]


@torch.no_grad()
def error(model, net, data):
    return float((model(data) - net(data)).square().mean())


# --- adaptive rounding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(model, data):
    """Squared error of each layer's output after its activation, summed over the walk's batches."""
    found = {}
    with rounding(model):
        for visit in walk(model, calls(data)):
            act = visit.layer.act or nn.Identity()
            pairs = zip(visit.inputs, visit.floats, strict=True)
            found[visit.name] = sum(float((visit.layer(x) - act(y)).square().sum()) for x, y in pairs)
    return found


def test_adaptive_rounding_more_than_halves_the_reconstruction_error_of_correlated_inputs():
    torch.manual_seed(0)
    x = torch.randn(1000, 8) @ torch.randn(8, 64) + 0.5  # 64 inputs on 8 directions: errors can cancel
    layer = nn.Linear(64, 32)
    net, held_out = nn.Sequential(layer), torch.randn(200, 8) @ torch.randn(8, 64)
    config = {"weight_bits": 3}
    nearest = calibrated(net, x, **config)
    adaptive = calibrated(net, x, rounding="adaptive", **config)
    assert error(adaptive, net, x) < 0.4 * error(nearest, net, x)
    assert held_out.shape == (200, 64)


def test_adaptive_rounding_finds_the_optimum_of_a_problem_that_can_be_searched():
    torch.manual_seed(1)
    ratio, x = torch.rand(1, 1, 8) * 4 - 2, torch.randn(400, 3) @ torch.randn(3, 8)
    problem = Problem(ratio=ratio, step=torch.ones(1, 1, 1), shift=torch.zeros(1, 1, 1), act=None, qmax=7)
    data = Columns(x=x[None], y=(x @ ratio[0].T)[None])
    ups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    errors = torch.stack([problem.error(data, ratio.floor() + up) for up in ups])
    nearest = problem.error(data, ratio.round())
    found = problem.error(data, learn(problem, data))
    assert int((errors < found).sum()) < 13  # of 256: among the best 5 %
    assert float(found) < 0.5 * float(nearest)


def test_each_weight_rounds_down_or_up_and_rounding_to_nearest_repeats_it():
    net = small_net()
    model = calibrated(net, weight_bits=4, rounding="adaptive")
    start = prepared(net, weight_bits=4, rounding="adaptive")
    for layer, before in zip(fused(model), fused(start), strict=True):
        choose_reach(before)
        w, scale = before.weight.detach(), before.scale(before.weight)
        ratio = (w / scale.reshape(-1, *[1] * (w.dim() - 1))).clamp(-7, 7)
        codes = layer.weight.detach() / layer.scale(layer.weight).reshape(-1, *[1] * (w.dim() - 1))
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert bool(((codes.round() - ratio).abs() < 1.0001).all())
        torch.testing.assert_close(layer.scale(layer.weight), scale)
    assert any(not torch.equal(a.weight, b.fake_quantized(b.weight)) for a, b in zip(fused(model), fused(start), strict=True))


def test_zeros_stay_zero_and_masks_stay():
    net = small_net()
    prune = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1), include_depthwise=True)
    rule = Rule("*", prune=prune, quantize=Quantize(**{**PLAIN, "weight_bits": 4, "rounding": "adaptive"}))
    small = torchopt.one_shot(net, [rule], DATA.split(16), example_inputs=(DATA[:1],), progress=False)
    for name in ("0", "3", "6", "9"):
        weight = small.get_submodule(name).weight
        assert float((weight == 0).float().mean()) >= 0.5
        assert weight.abs().max() > 0


def fused(model):
    return [m for m in model.modules() if isinstance(m, Fused)]


def test_calibration_is_deterministic():
    config = {"weight_bits": 4, "rounding": "adaptive", "bias_correction": True, "equalize": True}
    states = [calibrated(small_net(), **config).state_dict() for _ in range(2)]
    assert list(states[0]) == list(states[1])
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_a_corrected_model_loads(tmp_path):
    net = small_net()
    config = {"weight_bits": 4, "rounding": "adaptive", "bias_correction": True, "equalize": True}
    model = calibrated(net, **config)
    fresh = prepared(net, **config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(DATA), model(DATA))


def test_training_may_move_what_was_learned():
    model = calibrated(small_net(), weight_bits=4, rounding="adaptive").train()
    before = [layer.weight.detach().clone() for layer in fused(model)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(DATA).square().mean().backward()
    optimizer.step()
    torchopt.step(model)
    assert all(not torch.equal(layer.weight, was) for layer, was in zip(fused(model), before, strict=True))
    plain = torchopt.finalize(model.eval()).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(DATA), model(DATA), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_all_corrections_survive_finalize_export_and_verify_bit_for_bit(tmp_path, bits):
    net = small_net()
    model = calibrated(net, weight_bits=bits, rounding="adaptive", bias_correction=True, equalize=True)
    plain = torchopt.finalize(model).eval()
    with torch.no_grad():
        assert torch.equal(plain(DATA), model(DATA))
    for name in ("0", "3", "6", "9"):
        weight, scale = plain.get_submodule(name).weight, plain.get_submodule(name).weight_grid_scale
        codes = torch.round(weight / scale.reshape(-1, *[1] * (weight.dim() - 1)))
        assert torch.equal(codes * scale.reshape(-1, *[1] * (weight.dim() - 1)), weight)
        assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    path = tmp_path / "m.onnx"
    torchopt.export(plain, (DATA[:1],), path)
    verdict = torchopt.verify(plain, path, [DATA[:8]])
    assert verdict.weights_equal, verdict
    assert verdict.weights_compared >= 4
    assert verdict.within_one_step == 1.0, verdict


# --- where low-bit grids end -------------------------------------------------------------------------------------------------


def test_low_bit_grids_end_where_the_squared_error_is_least():
    layer = FusedLinear.of(nn.Linear(9, 2, bias=False), Quantize(weight_bits=2), 2)
    jitter = torch.linspace(-1e-3, 1e-3, 18).reshape(2, 9)  # values that repeat would be taken for a shared table's
    layer.weight.data = torch.tensor([[0.5] * 8 + [1.0], [1.0] * 9]) + jitter
    choose_reach(layer)
    # codes −1, 0, 1: the least of 8·(0.5 − s)² + (1 − s)² is at s = 5/9
    torch.testing.assert_close(layer.reach, torch.tensor([0.56, 1.0]), rtol=0, atol=0.006)


def test_eight_bits_keep_the_whole_range():
    assert FusedLinear.of(nn.Linear(4, 2), Quantize(rounding="nearest"), 8).reach is None
    assert FusedLinear.of(nn.Linear(4, 2), Quantize(weight_bits=4, learn_scale=True), 4).reach is None


def test_hold_fixes_codes_and_scale():
    layer = FusedConv2d.of(nn.Conv2d(2, 3, 1), Quantize(weight_bits=4), 4)
    codes = torch.tensor([[7.0, -3.0], [2.0, 1.0], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    scale = torch.tensor([0.1, 0.3, 0.7])
    hold(layer, codes, scale)
    torch.testing.assert_close(layer.scale(layer.weight)[:2], scale[:2])
    assert torch.equal(torch.round(layer.fake_quantized(layer.weight).detach() / scale.reshape(3, 1, 1, 1)), codes)


# --- bias correction ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_shift(model, data=DATA):
    """Over all channels, of the mean by which the rounded layer differs from the float one; corrections stand apart from floats."""
    with rounding(model):
        return max(float(mean_shift(visit).abs().max()) for visit in walk(model, calls(data)))


@torch.no_grad()
def a_step(model):
    """Integer kernels add biases in steps of s_x·s_w: nearer than that a mean cannot be brought."""
    layers = [layer for layer in fused(model) if layer.reads]
    assert len(layers) >= 3
    return max(float((layer.reads[0].scale * layer.folded(layer.weight)[2]).max()) for layer in layers)


def test_bias_correction_takes_the_mean_shift_away():
    net = small_net()
    plain = calibrated(net, weight_bits=4)
    corrected = calibrated(net, weight_bits=4, bias_correction=True)
    assert largest_shift(plain) > 0.02
    assert largest_shift(corrected) <= a_step(corrected) < 0.005


def test_calibrating_again_corrects_anew_and_not_twice():
    model = calibrated(small_net(), weight_bits=4, bias_correction=True)
    before = [layer.shift.clone() for layer in fused(model)]
    torchopt.calibrate(model, DATA.split(16), progress=False)
    assert largest_shift(model) <= a_step(model) < 0.005
    for layer, was in zip(fused(model), before, strict=True):
        assert float(was.abs().max()) > 0
        torch.testing.assert_close(layer.shift, was, rtol=0.5, atol=0.02)


def test_the_correction_is_the_mean_of_the_difference():
    net = nn.Sequential(nn.Linear(6, 3, bias=False)).eval()
    torch.manual_seed(2)
    nn.init.normal_(net[0].weight)
    x = torch.rand(32, 6)
    model = calibrated(net, x, weight_bits=3, bias_correction=True)
    plain = calibrated(net, x, weight_bits=3)
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule("0").shift, (net(x) - plain(x)).mean(0), rtol=1e-5, atol=1e-6)


def test_what_a_range_clips_where_nothing_reads_it_moves_no_mean():
    """One place in 64 holds −200, which switches every ReLU behind it off, so that the range ends at −5: the plain mean moved all by −3."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    nn.init.dirac_(net[0].weight)
    net[1].weight.data[:, 0] = net[1].weight.data[:, 0].abs() + 2
    x = torch.randn(64, 8, 8, 8)
    x[:, 0, 0, 0] = -200.0
    plain, corrected = (calibrated(net, x, rounding="least_squares", **auto(wanted)) for wanted in (False, True))
    assert float(corrected.get_submodule("quantizer_0").min_val) > -10
    assert float(corrected.get_submodule("0").shift.abs().max()) < 0.05
    assert error(corrected, net, x) < 1.02 * error(plain, net, x)
    plain, corrected = (calibrated(net, x, rounding="nearest", weight_bits=4, **auto(wanted)) for wanted in (False, True))
    assert error(corrected, net, x) < 0.95 * error(plain, net, x)


def auto(bias_correction):
    return {"observer": "auto", "equalize": True, "bias_correction": bias_correction}


def test_training_and_evaluation_apply_the_same_shift():
    model = calibrated(small_net(), weight_bits=4, bias_correction=True)
    for layer in fused(model):
        layer.freeze_bn()
    with torch.no_grad():
        expected = model(DATA)
        for quantizer in model.modules():
            if hasattr(quantizer, "disable_observer"):
                quantizer.disable_observer()
        torch.testing.assert_close(model.train()(DATA), expected, rtol=1e-5, atol=float(expected.abs().max()) / 100)


# --- equalization ------------------------------------------------------------------------------------------------------------


def unequal(act, depthwise=False, residual=False):
    """Channels whose ranges lie a factor 100 apart."""
    torch.manual_seed(4)
    middle = nn.Conv2d(8, 8, 3, padding=1, groups=8) if depthwise else nn.Conv2d(8, 8, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, middle, nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(1)).eval()
    net[1].weight.data = torch.logspace(-2, 0, 8)
    net[1].bias.data = 0.5 * torch.logspace(-2, 0, 8)
    return net


def ranges(model):
    peaks = Peaks(model)
    with rounding(model, enabled=False), torch.no_grad():
        peaks.run(DATA)
    return {str(node.target): peak for node, peak in peaks.found.items() if node.op == "call_module"}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity(), nn.ReLU6()])
@pytest.mark.parametrize("depthwise", [False, True])
def test_equalization_keeps_the_float_function_and_evens_the_ranges(act, depthwise):
    net = unequal(act, depthwise)
    model = prepared(net, equalize=True)
    before = ranges(model)["0"]
    equalize(model, calls(DATA))
    with rounding(model, enabled=False), torch.no_grad():
        torch.testing.assert_close(model(DATA), net(DATA), rtol=1e-5, atol=1e-6)
    after = ranges(model)["0"]
    assert before.max() / before.min() > 50
    if depthwise:  # nothing to trade with: all equal
        torch.testing.assert_close(after, after.max().expand(8), rtol=1e-5, atol=0)
    else:
        assert after.max() / after.min() < 12


def test_relu6_stays_and_its_channels_reach_to_6():
    net = unequal(nn.ReLU6(), depthwise=True)
    net[1].weight.data *= 20  # the large channels are clipped at 6, and may not grow
    model = prepared(net, equalize=True)
    assert float(ranges(model)["0"].max()) == 6.0
    equalize(model, calls(DATA))
    torch.testing.assert_close(ranges(model)["0"], torch.full((8,), 6.0), rtol=1e-5, atol=0)
    with rounding(model, enabled=False), torch.no_grad():
        torch.testing.assert_close(model(DATA), net(DATA), rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """A stream that two layers write and two read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.a(x))
        return self.c(y + self.b(y))


def test_a_residual_stream_is_scaled_as_one():
    torch.manual_seed(5)
    net = Residual().eval()
    net.norm.weight.data = torch.logspace(-2, 0, 8)
    model = prepared(net, equalize=True)
    assert equalize(model, calls(DATA)) == 1
    with rounding(model, enabled=False), torch.no_grad():
        torch.testing.assert_close(model(DATA), net(DATA), rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.a.weight if model.a.bn is None else model.a.bn.weight, net.norm.weight)


class Tapped(nn.Module):
    """A tensor that something else than a layer reads too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        return torch.sigmoid(y) * self.b(y)


def test_what_anything_else_reads_is_left_alone():
    model = prepared(Tapped(), equalize=True)
    weight = model.a.weight.detach().clone()
    assert equalize(model, calls(DATA)) == 0
    assert torch.equal(model.a.weight, weight)


def test_equalization_respects_masks():
    prune = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1))
    net = unequal(nn.ReLU())
    rule = Rule("*", prune=prune, quantize=Quantize(equalize=True))
    model = torchopt.prepare(net, [rule], (DATA[:1],)).eval()
    torchopt.step(model)
    with rounding(model, enabled=False), torch.no_grad():
        expected = model(DATA)
        equalize(model, calls(DATA))
        torch.testing.assert_close(model(DATA), expected, rtol=1e-5, atol=1e-6)


def test_equalization_pays_where_channels_are_unequal():
    net = unequal(nn.ReLU(), depthwise=True)
    plain, equal = calibrated(net), calibrated(net, equalize=True)
    assert error(equal, net, DATA) < 0.8 * error(plain, net, DATA)


# --- samples and columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (3, 1), groups=4, dilation=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv3d(4, 4, 2),
        nn.Linear(9, 5),
    ],
    ids=str,
)
def test_columns_give_the_layer_itself(layer):
    shape = {nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 4, 9, 9), nn.Conv3d: (2, 4, 5, 5, 5), nn.Linear: (2, 3, 9)}[type(layer)]
    x = torch.randn(shape)
    quantized = fused(prepared(nn.Sequential(copy.deepcopy(layer)), x))[0]
    with torch.no_grad():
        data = columns(quantized, [x], [layer(x)], 50, seed=0)
        groups = getattr(layer, "groups", 1)
        y = torch.bmm(data.x, layer.weight.reshape(groups, len(layer.weight) // groups, -1).transpose(1, 2))
        torch.testing.assert_close(y + layer.bias.reshape(groups, 1, -1), data.y, rtol=1e-5, atol=1e-5)


def test_samples_are_cut_to_the_number_asked_for():
    found = kept((((torch.zeros(50, 2), 3), {"m": torch.zeros(50)}) for _ in range(9)), 120)
    assert [len(args[0]) for args, _ in found] == [50, 50, 20]
    assert len(found[-1][1]["m"]) == 20
    assert found[-1][0][1] == 3


def test_an_iterator_of_batches_is_read_to_its_end():
    net = small_net()
    batches = [DATA, 3 * DATA, 10 * DATA, 2 * DATA]
    streamed = torchopt.calibrate(prepared(net, bias_correction=True), iter(batches), progress=False)
    listed = torchopt.calibrate(prepared(net, bias_correction=True), batches, progress=False)
    for one, other in zip(streamed.state_dict().values(), listed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "float16"])
@pytest.mark.parametrize("field", [{"bias_correction": True}, {"rounding": "adaptive"}])
def test_modes_without_calibration_refuse_corrections(mode, field):
    with pytest.raises(ConfigError, match=rf"Quantize.{next(iter(field))}: learns from calibration data.*mode='static'"):
        Quantize(mode=mode, **field)


def test_a_transposed_convolution_is_refused_by_adaptive_rounding():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2))
    with pytest.raises(ModelError, match="quantize: 1 is a ConvTranspose2d, adaptive rounding knows.*rounding='nearest'"):
        prepared(net, rounding="adaptive")


def test_shared_values_are_refused_by_adaptive_rounding():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    rule = Rule("*", cluster=torchopt.Cluster(n_clusters=4), quantize=Quantize(rounding="adaptive"))
    with pytest.raises(ModelError, match=r"calibrate: 0.weight holds shared values, which rounding='adaptive' would pull apart"):
        torchopt.one_shot(net, [rule], [DATA], example_inputs=(DATA[:1],), progress=False)


def test_equalization_leaves_shared_values_alone():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    rule = Rule("*", cluster=torchopt.Cluster(n_clusters=4), quantize=Quantize(**{**PLAIN, "equalize": True}))
    model = torchopt.prepare(net, [rule], (DATA[:1],)).eval()
    assert equalize(model, calls(DATA)) == 0


def test_data_that_is_not_finite_is_refused_before_weights_change():
    net = small_net()
    model = prepared(net, equalize=True, bias_correction=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="NaN or infin"):
        torchopt.calibrate(model, [DATA * float("nan")], progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_no_batch_is_refused():
    with pytest.raises(DataError, match="no batch"):
        torchopt.calibrate(prepared(small_net(), equalize=True), [], progress=False)


def test_biases_are_corrected_where_rounding_learns_from_data():
    assert Quantize().corrects_bias
    assert not Quantize(rounding="nearest").corrects_bias
    assert Quantize(rounding="nearest", bias_correction=True).corrects_bias
    assert not Quantize(bias_correction=False).corrects_bias
    assert not Quantize(learn_scale=True).corrects_bias
    assert not Quantize(mode="dynamic").corrects_bias


def test_a_shift_of_0_adds_nothing_and_one_from_a_file_is_added():
    x = torch.randn(16, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    rules = [Rule("*", quantize=Quantize(weight_bits=3))]
    fresh = torchopt.prepare(net, rules, (x[:1],))
    assert not fresh.get_submodule("0").shifts
    ready = torchopt.calibrate(torchopt.prepare(net, rules, (x[:1],)), [x], progress=False).eval()
    assert ready.get_submodule("0").shifts
    fresh.load_state_dict(ready.state_dict())
    assert torch.equal(fresh.eval()(x), ready(x))
    assert torchopt.finalize(ready).get_submodule("0").bias is not None
