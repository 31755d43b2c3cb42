"""What five faults that were planted once, and that no test noticed, change in numbers."""

import copy

import onnx
import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.network.grid import grids

PLAIN = {"observer": "minmax", "rounding": "nearest", "equalize": False, "bias_correction": False}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(net, x, **config):
    ready = torchopt.prepare(net, [Rule("*", quantize=Quantize(**{**PLAIN, **config}))], (x[:1],), preserve=False).eval()
    return torchopt.calibrate(ready, [x], progress=False)


def finished(net, x, **config):
    return torchopt.finalize(calibrated(net, x, **config)).eval()


def weight_of(final):
    return final.get_parameter("0.weight").detach()


def heavy_tailed(*shape):
    """Weights of which a grid of few bits leaves the largest outside."""
    return normal(*shape).pow(3)


# --- gradients of weights outside the grid -----------------------------------------------------------------------------------


def layer_and_norm(rank):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False) if rank == 2 else nn.Conv2d(16, 8, 2, bias=False)
    layer.weight.data = heavy_tailed(*layer.weight.shape)
    return nn.Sequential(layer) if rank == 2 else nn.Sequential(layer, nn.BatchNorm2d(8))


def outside(ready, weight, bits):
    """Which weights round to an integer beyond the last one."""
    grid = grids(torchopt.finalize(copy.deepcopy(ready)))["0.weight"]
    return (weight / grid.broadcast(weight.dim())).round().abs() > 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_weight_outside_the_grid_has_no_gradient_and_one_inside_has_the_whole(bits):
    x, pull = normal(32, 64, seed=1), normal(32, 8, seed=2)
    net = layer_and_norm(2)
    ready = calibrated(net, x, weight_bits=bits)
    beyond = outside(ready, net[0].weight.detach(), bits)
    assert 0 < int(beyond.sum()) < beyond.numel() / 2
    ready.train()
    read = []
    name, weight = next((n, p) for n, p in ready.named_parameters() if p.shape == (8, 64))
    layer = ready.get_submodule(name.rpartition(".")[0])
    layer.register_forward_pre_hook(lambda _, given: read.append(given[0].detach()))
    made = ready(x)
    (made * pull).sum().backward()
    expected = (pull.T @ read[0]).masked_fill(beyond, 0.0)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_outside_the_grid_has_no_gradient_under_batch_norm(training):
    x = normal(8, 16, 6, 6, seed=1)
    net = layer_and_norm(4)
    ready = calibrated(net, x, weight_bits=3)
    weight = next(p for p in ready.parameters() if p.shape == net[0].weight.shape)
    w, step = net[0].weight.detach(), grids(torchopt.finalize(copy.deepcopy(ready)))["0.weight"].scale
    factor = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach()
    beyond = (w / (step / factor)[:, None, None, None]).round().abs() > 3
    assert 0 < int(beyond.sum()) < beyond.numel() / 2
    ready.train(training)
    (ready(x) * normal(8, 8, 5, 5, seed=2)).sum().backward()
    assert torch.equal(weight.grad == 0, beyond)


# --- zeros -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_exactly_zero_stay_so_when_errors_are_spread(bits):
    x = normal(400, 6, seed=1) @ normal(6, 32, seed=2)  # correlated: errors of others would land on the zeros
    net = nn.Sequential(nn.Linear(32, 16))
    net[0].weight.data = normal(16, 32) * (normal(16, 32, seed=3) > 0)
    zero = net[0].weight == 0
    final = finished(net, x, weight_bits=bits, rounding="least_squares")
    nearest = finished(net, x, weight_bits=bits)
    assert not torch.equal(weight_of(final), weight_of(nearest))  # errors were spread at all
    assert int(zero.sum()) > 200
    assert int(weight_of(final)[zero].count_nonzero()) == 0


# --- one matrix, two products ------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another: one matrix projects both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x, y):
        return self.attention(x, y, y, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_both_products_with_one_matrix_run_as_integers_and_it_is_stored_once(tmp_path):
    x, y = normal(4, 5, 32, seed=1), normal(4, 7, 32, seed=2)
    rules = [Rule("*", quantize=Quantize(**PLAIN))]
    final = torchopt.one_shot(Cross().eval(), rules, [(x, y)], example_inputs=(x, y), progress=False).eval()
    torchopt.export(final, (x, y), tmp_path / "m.onnx", pack=False)
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert placement.float == []
    assert placement.kernels["MatMulIntegerToFloat"] == 3  # queries, keys and values, what comes out
    stored = [tuple(t.dims) for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(dims in ((96, 32), (32, 96)) for dims in stored) == 1


# --- values that an earlier round left shared --------------------------------------------------------------------------------


def few_values():
    """Six values in a tensor of which half of the channels never use the two largest."""
    table = torch.tensor([-0.9, -0.31, -0.07, 0.11, 0.43, 0.77])
    codes = torch.randint(0, 6, (16, 32), generator=torch.Generator().manual_seed(0))
    codes[8:] = codes[8:].clamp(1, 4)
    return table[codes]


def test_few_values_in_a_tensor_have_one_scale_and_stay_few():
    net = nn.Sequential(nn.Linear(32, 16))
    net[0].weight.data = few_values()
    final = finished(net, normal(64, 32, seed=1))
    grid = grids(final)["0.weight"]
    assert grid.scale.numel() == 1
    assert len(weight_of(final).unique()) == 6
    torch.testing.assert_close(weight_of(final), few_values(), rtol=0, atol=0.9 / 254 * 1.001)


def test_many_values_in_a_tensor_have_a_scale_a_channel():
    net = nn.Sequential(nn.Linear(32, 16))
    final = finished(net, normal(64, 32, seed=1))
    assert grids(final)["0.weight"].scale.shape == (16,)


# --- one layer, two grids ----------------------------------------------------------------------------------------------------


class TwoGrids(nn.Module):
    """A head that two levels share, whose values lie on different grids; or on one, where `far` is 1."""

    def __init__(self, far, bias=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.near, self.beyond, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.beyond.weight.data *= far
        self.beyond.bias.data *= far
        self.head.bias.data = torch.tensor([0.1234567, -0.7654321, 0.3333333, 0.0123457]) * bias

    def forward(self, x):
        return self.head(self.near(x)), self.head(self.beyond(x))


def test_a_bias_that_is_added_in_two_steps_stays_as_it_is():
    x = normal(8, 3, 4, 4, seed=1)
    net = TwoGrids(far=7.3).eval()
    final = finished(net, x)
    assert torch.equal(final.head.bias, net.head.bias)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("far", [7.3, 0.013])
def test_a_layer_called_on_two_grids_gives_what_the_file_gives(tmp_path, far):
    x = normal(8, 3, 4, 4, seed=1)
    final = finished(TwoGrids(far).eval(), x)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    assert len(torchopt.inspect(tmp_path / "m.onnx").integer) == 4
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.within_one_step == 1.0


@pytest.mark.parametrize("far", [1e-4, 1e4])
def test_a_bias_fits_into_32_bits_of_the_finer_of_two_grids(far):
    x = normal(8, 3, 4, 4, seed=1)
    net = TwoGrids(far, bias=1e4 if far < 1 else 1e8).eval()
    net.head.weight.data *= 1e-3
    ready = calibrated(net, x)
    ready(x)
    step = min(float(m.scale[0]) for n, m in ready.named_modules() if n.startswith("quantizer") and hasattr(m, "scale"))
    final = torchopt.finalize(ready)
    steps = net.head.bias.detach().abs() / (grids(final)["head.weight"].scale * step)
    assert float(steps.max()) < 2**31
