"""What strangers' code does around its layers, in torch and in the file: pieces, indices, sizes, shared heads, hooks, kept activations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.errors import ModelError
from torchopt.network.grid import grids

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
STATIC = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]
WEIGHTS = [Rule("*", quantize=Quantize(mode="weight_only"))]


class Code(nn.Module):
    """A forward given as a function of the module and its input."""

    def __init__(self, code: Callable[[nn.Module, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


def _unpooled(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y, places = m.pool(F.relu(m.a(x)))
    return m.b(m.unpool(y, places))


def _shared(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found, f = [], m.stem(x)
    for _ in range(3):
        found.append(m.out(F.relu(m.bn(m.conv(f)))).flatten(2))
        f = F.max_pool2d(f, 2)
    return torch.cat(found, 2)


CASES = {
    "pool with indices": lambda: Code(
        _unpooled, a=nn.Conv2d(3, 8, 3, padding=1), pool=nn.MaxPool2d(2, return_indices=True), unpool=nn.MaxUnpool2d(2),
        b=nn.Conv2d(8, 4, 3),
    ),
    "part of the chunks": lambda: Code(
        lambda m, x: m.b(torch.cat(m.a(x).chunk(4, 1)[1:], 1)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(6, 4, 3)
    ),
    "pieces in reverse": lambda: Code(
        lambda m, x: m.b(torch.cat(m.a(x).split(2, 1)[::-1], 1)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)
    ),
    "grouped transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, 2, groups=4, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 4, 3),
    ),
    "output size": lambda: Code(
        lambda m, x: m.b(F.relu(m.t(m.a(x), output_size=x.shape[-2:]))),
        a=nn.Conv2d(3, 8, 3, 2, 1), t=nn.ConvTranspose2d(8, 8, 3, 2, padding=1), b=nn.Conv2d(8, 4, 3),
    ),
    "shared over levels": lambda: Code(
        _shared, stem=nn.Conv2d(3, 8, 3, padding=1), conv=nn.Conv2d(8, 8, 3, padding=1, bias=False), bn=nn.BatchNorm2d(8),
        out=nn.Conv2d(8, 4, 3, padding=1),
    ),
}  # fmt: skip
LEAST = {"pool with indices": 20.0}  # dB; rounding moves places


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_code_around_layers_runs_on_integers_in_torch_and_in_the_file(case: str, tmp_path: Path):
    torch.manual_seed(0)
    model, x = CASES[case]().eval(), torch.randn(4, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x,), progress=False).eval()
    wanted = model(x)
    assert float(10 * torch.log10(wanted.var() / (final(x) - wanted).square().mean())) > LEAST.get(case, 33.0)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert {f"{name}.weight" for name in layers} <= set(grids(final))
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert (
        verdict.within_one_step >= 0.999 or verdict.max_steps < 1.01
    )  # a step and its rounding, where layers read several grids


@torch.no_grad()
@pytest.mark.parametrize("rules", [STATIC, WEIGHTS], ids=["static", "weight_only"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_weights_that_hooks_compute_are_baked_and_said(norm: str, rules: list[Rule], tmp_path: Path):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(getattr(nn.utils, norm)(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3))

    model, x = network(), torch.randn(4, 3, 8, 8)
    wanted = model.eval()(x)  # after a call the weight is a tensor of autograd's, which copy.deepcopy refuses
    ready = torchopt.prepare(model, rules, (x,))
    assert [(s.name, s.technique) for s in ready.torchopt_state.skipped] == [("0.weight", norm)]
    final = torchopt.one_shot(model, rules, [x], example_inputs=(x,), progress=False).eval()
    assert sorted(grids(final)) == ["0.weight", "2.weight"]
    torch.testing.assert_close(final(x), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", network()).eval()
    torch.testing.assert_close(again(x), final(x), rtol=0, atol=0)


class Keeps(nn.Module):
    """Keeps its last activation, and all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(8, 8), nn.Linear(8, 4), {"all": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = F.relu(self.a(x))
        self.seen["all"].append(self.last)
        return self.b(self.last)


@pytest.mark.parametrize("rules", [STATIC, WEIGHTS], ids=["static", "weight_only"])
def test_a_module_that_keeps_its_last_activation_is_prepared(rules: list[Rule]):
    torch.manual_seed(0)
    model, x = Keeps(), torch.randn(16, 8)
    wanted = model(x)
    final = torchopt.one_shot(model, rules, [x], example_inputs=(x,), progress=False).eval()
    assert sorted(grids(final)) == ["a.weight", "b.weight"]
    torch.testing.assert_close(final(x), wanted, rtol=0, atol=0.05 * float(wanted.detach().abs().max()))
    assert model.last.requires_grad


class Lock:
    """What cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].guard = Lock()
    with pytest.raises(ModelError, match=r"prepare: the attribute 'guard' of 0 cannot be copied \(cannot pickle '_thread.lock'"):
        torchopt.prepare(model, WEIGHTS)
