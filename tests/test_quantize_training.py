"""Training on integer grids: ranges, gradients, milestones, resume, copies, and every refusal."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt.quantize import ActivationQuantizer, FixedQuantize
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.rounding import fake_quantize, learned_fake_quantize
from torchopt.quantize.layers.weight_grid import Snap, lsq, weight_scale


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def prepare(**config):
    return torchopt.prepare(net(), [torchopt.Rule("*", quantize=torchopt.Quantize(**config))], (data()[0],))


def train(model, steps, lr=0.05):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for seed in range(steps):
        x, y = data(seed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        torchopt.step(model)


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


def test_Q2_fake_quantize_on_minus_6_to_6():
    quantizer = ActivationQuantizer()
    quantizer.set_range(torch.tensor(-6.0), torch.tensor(6.0))
    quantizer.eval()
    x = torch.tensor([-6.0, -3.0, 0.0, 0.05, 0.1, 3.0, 6.0])
    expected = [0, 0, 0, 0.04705906, 0.09411764, 3.011765, 5.9764705]
    np.testing.assert_allclose(torch.relu(quantizer(x)).numpy(), expected, rtol=1e-5)


def test_Q5_scales_run_along_the_output_channels_depthwise_too():
    w = torch.arange(1.0, 6.0).reshape(5, 1, 1, 1).expand(5, 1, 3, 3)
    np.testing.assert_allclose(weight_scale(w, 127, 0).numpy(), np.arange(1, 6) / 127, rtol=1e-6)
    assert weight_scale(w, 127, None).shape == ()


def test_snap_is_symmetric_and_passes_the_gradient():
    w = torch.tensor([[-1.0, 0.26, 0.0]], requires_grad=True)
    snapped = Snap.apply(w, weight_scale(w, 3, 0)[:, None], 3, False)
    np.testing.assert_allclose(snapped.detach().numpy(), [[-1.0, 1 / 3, 0.0]], rtol=1e-6)
    snapped.sum().backward()
    assert w.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_lsq_gradient_of_the_step():
    """Inside: q − w/s; outside: ±Q; scaled by 1/√(N·Q) (arXiv:1902.08153, eq. 3)."""
    w = torch.tensor([0.6, 2.4, -9.0, 9.0, 1.0])
    s = torch.tensor(1.0, requires_grad=True)
    lsq(w, s, 3).sum().backward()
    expected = ((1 - 0.6) + (2 - 2.4) - 3 + 3 + 0.0) / (5 * 3) ** 0.5
    np.testing.assert_allclose(s.grad.item(), expected, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("zero_point", [0, 37])
def test_rounding_of_activations_is_that_of_torchs_operators(layout, zero_point):
    """Values and gradients of 4,704 entries, many of them outside the range: bit for bit; the learned step's within 1e-5."""
    torch.manual_seed(0)
    x = (3 * torch.randn(6, 16, 7, 7)).contiguous(memory_format=layout).requires_grad_()
    scale, zero, gradient = (
        torch.tensor([0.013]).requires_grad_(),
        torch.tensor([zero_point], dtype=torch.int32),
        torch.randn(x.shape),
    )
    damping = (x.numel() * 255) ** -0.5
    expected = torch.fake_quantize_per_tensor_affine(x, scale.detach()[0], zero[0], 0, 255)
    learned = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero.float(), 0, 255, damping)
    ours = fake_quantize(x, scale.detach(), zero, 0, 255)
    ours_learned = learned_fake_quantize(x, scale, zero, 0, 255)
    for got, wanted in ((ours, expected), (ours_learned, learned)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        to_x = [torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (got, wanted)]
        torch.testing.assert_close(*to_x, rtol=0, atol=0)
        assert 0.3 < float((to_x[0] == 0).float().mean()) < 0.7
    to_scale = [torch.autograd.grad(y, scale, gradient)[0] for y in (ours_learned, learned)]
    torch.testing.assert_close(*to_scale, rtol=1e-5, atol=1e-6)


def test_training_moves_the_weights_and_every_range():
    ready = prepare()
    before = copy.deepcopy(ready.state_dict())
    train(ready, 3)
    assert all(q.calibrated for q in quantizers(ready))
    assert not torch.equal(ready.state_dict()["0.weight"], before["0.weight"])
    final = torchopt.finalize(ready).eval()
    assert list(torchopt.network.grid.grids(final)) == ["0.weight", "3.weight", "7.weight"]
    assert sum(isinstance(m, FixedQuantize) for m in final.modules()) == 4
    assert not any(isinstance(m, nn.ReLU | nn.ReLU6) for m in final.modules())  # the ranges cover them
    with torch.no_grad():
        x = data()[0]
        torch.testing.assert_close(final(x), ready.eval()(x), rtol=0, atol=0)


def test_after_a_relu_the_zero_point_is_exactly_zero():
    ready = prepare()
    train(ready, 1)
    points = [int(q.zero_point) for q in quantizers(ready)]
    assert points[0] > 0
    assert points[1:] == [0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_of_the_grid(bits):
    ready = prepare(weight_bits=bits)
    train(ready, 2)
    final = torchopt.finalize(ready)
    for name, grid in torchopt.network.grid.grids(final).items():
        codes = grid.codes(final.get_parameter(name))
        assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_avx2_weights_keep_to_seven_bits():
    ready = torchopt.prepare(net(), [torchopt.Rule("*", quantize=torchopt.Quantize())], (data()[0],), target="ort-x86-avx2")
    torchopt.calibrate(ready, [data()[0]], progress=False)
    final = torchopt.finalize(ready)
    assert {int(g.codes(final.get_parameter(n)).abs().max()) for n, g in torchopt.network.grid.grids(final).items()} == {63}


def test_learned_scales_are_trained():
    ready = prepare(weight_bits=3, learn_scale=True)
    train(ready, 1)
    weight = ready.get_submodule("0").weight_scale.detach().clone()
    activation = [q.scale.detach().clone() for q in quantizers(ready)]
    train(ready, 2)
    assert not torch.equal(weight, ready.get_submodule("0").weight_scale)
    assert sum(not torch.equal(a, q.scale) for a, q in zip(activation, quantizers(ready))) == len(activation)
    assert torchopt.network.grid.grids(torchopt.finalize(ready))["0.weight"].bits == 3


def test_milestones_start_rounding_then_freeze_ranges_then_batch_norm():
    ready = prepare(milestones=[1, 2, 3])
    layer = next(m for m in ready.modules() if isinstance(m, Fused) and m.bn is not None)
    x = data()[0]
    assert not layer.rounding
    train(ready, 1)
    assert layer.rounding
    assert all(q.observing for q in quantizers(ready))
    train(ready, 1)
    ranges = [float(q.max_val) for q in quantizers(ready)]
    ready(10 * x)
    assert [float(q.max_val) for q in quantizers(ready)] == ranges
    train(ready, 1)
    mean = layer.bn.running_mean.clone()
    ready.train()(10 * x)
    torch.testing.assert_close(layer.bn.running_mean, mean, rtol=0, atol=0)


def test_resume_is_bit_equal_across_milestones():
    config = {"milestones": [1, 3, 4]}
    ready = prepare(**config)
    train(ready, 2)
    again = prepare(**config)
    again.load_state_dict(copy.deepcopy(ready.state_dict()), strict=True)
    train(ready, 3)
    train(again, 3)
    for (name, ours), theirs in zip(ready.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_copy_is_independent_and_keeps_the_step():
    ready = prepare()
    train(ready, 1)
    twin = copy.deepcopy(ready)
    assert int(twin.torchopt_state.step) == 1
    kept = ready.state_dict()["0.weight"].clone()
    train(twin, 1)
    torch.testing.assert_close(ready.state_dict()["0.weight"], kept, rtol=0, atol=0)


def test_only_the_layers_asked_for_are_quantized():
    ready = torchopt.prepare(net(), [torchopt.Rule("3", quantize=torchopt.Quantize())], (data()[0],))
    torchopt.calibrate(ready, [data()[0]], progress=False)
    final = torchopt.finalize(ready)
    assert list(torchopt.network.grid.grids(final)) == ["3.weight"]
    torch.testing.assert_close(final.get_parameter("0.weight"), net()[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"])
def test_every_observer_calibrates(observer):
    ready = prepare(observer=observer)
    torchopt.calibrate(ready, [data(s)[0] for s in range(4)], progress=False)
    first = quantizers(ready)[0]
    low = min(float(data(s)[0].min()) for s in range(4))
    assert float(first.min_val) <= 0.25 * low
    assert float(first.min_val) >= low - 1e-6


def test_an_uncalibrated_model_is_refused():
    with pytest.raises(
        torchopt.StateError, match=r"finalize: the input 'input' \(quantizer_0\) has not seen.*torchopt\.calibrate"
    ):
        torchopt.finalize(prepare())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "gave no batch; give at least one"),
        ([torch.full((2, 1, 8, 8), torch.nan)], "batch 0 holds NaN or infinity; clean the data"),
    ],
)
def test_bad_calibration_data_is_refused(batches, message):
    with pytest.raises(torchopt.DataError, match=message):
        torchopt.calibrate(prepare(), batches, progress=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits: got 1; an integer from 2 to 8"),
        ({"weight_bits": 9}, r"weight_bits: got 9"),
        ({"activation_bits": 4}, r"activation_bits: got 4; 8 or 16"),
        ({"mode": "statik"}, r"mode: got 'statik'.*did you mean 'static'"),
        ({"observer": "hist"}, r"observer: got 'hist'"),
        ({"rounding": "up"}, r"rounding: got 'up'"),
        ({"per_channel": 1}, r"per_channel: got 1; true or false"),
        ({"milestones": [3, 2, 1]}, r"milestones: got \[3, 2, 1\]; three optimizer steps in rising order"),
        ({"block_size": 24}, r"block_size: got 24; a power of two"),
        ({"mode": "dynamic", "activation_bits": 16}, r"activation_bits: 'dynamic' rounds to 8 bits; 8 is needed"),
        ({"fallback": "always"}, r"fallback: got 'always'; 'auto' or None"),
        ({"mode": "float16", "weight_bits": 4}, r"'float16' has no scales"),
        ({"learn_scale": True, "rounding": "adaptive"}, r"learn_scale: training moves what rounding='adaptive' fixed"),
    ],
)
def test_bad_fields_are_refused(config, message):
    with pytest.raises(torchopt.ConfigError, match=message):
        torchopt.Quantize(**config)


def test_an_unknown_target_is_refused():
    with pytest.raises(torchopt.ConfigError, match=r"target='ort-x87' is unknown.*did you mean 'ort-x86'"):
        torchopt.prepare(net(), [torchopt.Rule("*", quantize=torchopt.Quantize())], (data()[0],), target="ort-x87")


def test_static_without_example_inputs_is_refused():
    with pytest.raises(torchopt.StateError, match=r"give example_inputs=\(x,\)"):
        torchopt.prepare(net(), [torchopt.Rule("*", quantize=torchopt.Quantize())])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_untraceable_control_flow_names_the_line_and_the_remedy():
    with pytest.raises(torchopt.ModelError, match=r"Branching depends on data.*x\.sum\(\) > 0.*mode='weight_only'"):
        torchopt.prepare(Branching(), [torchopt.Rule("*", quantize=torchopt.Quantize())], (torch.ones(1, 4),))


def test_weight_only_takes_an_untraceable_model():
    ready = torchopt.prepare(Branching(), [torchopt.Rule("*", quantize=torchopt.Quantize(mode="weight_only"))])
    final = torchopt.finalize(ready)
    assert final.layer.weight.unique().numel() > 4
    torchopt.network.grid.grids(final)["layer.weight"].codes(final.layer.weight)
    with pytest.raises(torchopt.StateError, match="nothing in this model observes data"):
        torchopt.calibrate(ready, [torch.ones(1, 4)], progress=False)


def test_float16_rounds_to_half():
    final = torchopt.finalize(torchopt.prepare(net(), [torchopt.Rule("*", quantize=torchopt.Quantize(mode="float16"))]))
    for name in ("0.weight", "7.weight"):
        value = final.get_parameter(name)
        torch.testing.assert_close(value, value.half().float(), rtol=0, atol=0)
