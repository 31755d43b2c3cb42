"""Code that changes tensors in place is quantized as what it computes: the same network written without such changes, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, and what a test computes with them."""

    def __init__(self, code) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.code = nn.ReLU(inplace=True), code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


def statement(change):
    """y = a(x), a statement that changes y and names no result, then b(y)."""

    def code(net, x):
        y = net.a(x)
        change(net, y)
        return net.b(y)

    return code


def reads_again(net, x):
    y = net.norm(net.a(x))
    z = net.act(y)
    return net.b(z) + y  # y has been through the ReLU too


def adds(net, x):
    y = torch.relu(net.a(x))
    z = net.b(y)
    z.add_(y)
    return z


def sums(net, x):
    y = z = torch.relu(net.a(x))
    y += 1.0
    return net.b(y) + z  # the same tensor


def halves(net, x):
    one, two = net.a(x).chunk(2, 1)
    one.relu_()
    return net.b(torch.cat([one, two], 1))


IN_PLACE = {
    "relu_": (statement(lambda net, y: y.relu_()), lambda net, x: net.b(net.a(x).relu())),
    "F.relu_": (statement(lambda net, y: F.relu_(y)), lambda net, x: net.b(net.a(x).relu())),
    "F.relu(inplace)": (statement(lambda net, y: F.relu(y, inplace=True)), lambda net, x: net.b(net.a(x).relu())),
    "nn.ReLU(inplace)": (statement(lambda net, y: net.act(y)), lambda net, x: net.b(net.a(x).relu())),
    "leaky_relu_": (statement(lambda net, y: F.leaky_relu_(y, 0.1)), lambda net, x: net.b(F.leaky_relu(net.a(x), 0.1))),
    "hardswish": (statement(lambda net, y: F.hardswish(y, inplace=True)), lambda net, x: net.b(F.hardswish(net.a(x)))),
    "mul_": (statement(lambda net, y: y.mul_(0.5)), lambda net, x: net.b(net.a(x) * 0.5)),
    "read again": (reads_again, lambda net, x: (lambda y: net.b(y) + y)(torch.relu(net.norm(net.a(x))))),
    "add_": (adds, lambda net, x: (lambda y: net.b(y) + y)(torch.relu(net.a(x)))),
    "+=": (sums, lambda net, x: (lambda y: net.b(y) + y)(torch.relu(net.a(x)) + 1.0)),
    "one of two pieces": (
        halves,
        lambda net, x: (lambda p: net.b(torch.cat([p[0].relu(), p[1]], 1)))(net.a(x).chunk(2, 1)),
    ),
}


def prepared(code) -> nn.Module:
    ready = torchopt.prepare(Net(code), [Rule("*", quantize=Quantize(rounding="nearest"))], (X[:1],))
    return torchopt.calibrate(ready, [X], progress=False)


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_network_is_the_one_that_the_code_computes(name):
    changing, plain = IN_PLACE[name]
    with torch.no_grad():
        torch.testing.assert_close(Net(changing).eval()(X), Net(plain).eval()(X), rtol=1e-6, atol=1e-6)  # the test's own premise
        one, other = prepared(changing), prepared(plain)
        torch.testing.assert_close(one.eval()(X), other.eval()(X), rtol=0, atol=0)
        final = torchopt.finalize(one).eval()
        torch.testing.assert_close(final(X), torchopt.finalize(other).eval()(X), rtol=0, atol=0)
        error = (final(X) - Net(plain).eval()(X)).square().sum() / Net(plain).eval()(X).square().sum()
    assert error < 1e-3  # 30 dB: the float network is not another one


@pytest.mark.parametrize("name", ["read again", "nn.ReLU(inplace)", "add_"])
def test_it_trains_as_the_code_without_changes(name):
    gradients = []
    for code in IN_PLACE[name]:
        ready = prepared(code).train()
        ready(X).square().mean().backward()
        gradients.append(ready.get_parameter("a.weight").grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_ranges_are_those_of_the_values_before_a_change():
    """LeakyReLU(inplace) behind a convolution: the range chosen for the convolution's output reaches its own minimum."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.01, inplace=True), nn.Conv2d(8, 4, 3)).eval()
    ready = torchopt.prepare(net, [Rule("*", quantize=Quantize(observer="auto", equalize=False))], (X[:1],))
    torchopt.calibrate(ready, [X], progress=False)
    quantizers = [m for m in ready.modules() if isinstance(m, torchopt.quantize.ActivationQuantizer)]
    with torch.no_grad():
        least = float(net[0](X).min())
    assert float(quantizers[1].min_val) < 0.5 * least


def of_a_part(net, x):
    y = net.a(x)
    y[:, 0].relu_()
    y[:, 1].relu_()
    return net.b(y)


def test_a_change_of_a_part_is_written_back():
    net = Net(of_a_part).eval()
    ready = torchopt.calibrate(torchopt.prepare(net, [Rule("*", quantize=Quantize())], (X[:1],)), [X], progress=False)
    final = torchopt.finalize(ready)
    with torch.no_grad():
        expected = net(X)
        unchanged = net.b(net.a(X))
        assert float((final(X) - expected).square().mean()) < 1e-4 * float(expected.abs().max()) ** 2
        assert float((unchanged - expected).abs().max()) > 0.1 * float(expected.abs().max())


def of_a_view(net, x):
    y = net.a(x)
    y.transpose(0, 1)[0].relu_()
    return net.b(y)


def test_a_change_of_a_view_is_refused_with_the_line_and_the_remedy():
    with pytest.raises(torchopt.ModelError, match=r"relu_ changes a part .*\[0\]\.relu_\(\)\); make a new tensor"):
        torchopt.prepare(Net(of_a_view), [Rule("*", quantize=Quantize())], (X[:1],))


def test_the_callers_modules_keep_their_inplace():
    net = Net(reads_again)
    torchopt.prepare(net, [Rule("*", quantize=Quantize())], (X[:1],))
    assert net.act.inplace


class Flat(nn.Module):
    """`view` after a convolution, which no tensor with its channels last takes."""

    def __init__(self, traced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.traced = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(512, 4), traced

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        if not self.traced and str(x.dtype)[:5] != "torch":  # a Proxy's dtype is one too: cannot be followed
            raise TypeError("not a tensor")
        return self.head(y.view(y.size(0), -1))


@pytest.mark.parametrize("traced", [True, False])
def test_view_after_a_convolution_calibrates(traced, tmp_path):
    model = Flat(traced).eval()
    assert isinstance(torchopt.prepare(model, [Rule("*", quantize=Quantize())], (X[:1],)), torch.fx.GraphModule) == traced
    final = torchopt.one_shot(model, [Rule("*", quantize=Quantize())], [X], example_inputs=(X[:1],), progress=False)
    torch.testing.assert_close(final(X), model(X), rtol=0.05, atol=0.02)
    torchopt.export(final, (X[:1],), tmp_path / "m.onnx")
    assert torchopt.inspect(tmp_path / "m.onnx").float == []
