"""With fallback="auto" the front of a network with gated activations stays float where the target's costs say so; else nothing does."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize.graph.float_front import ENTRANCE, leave_front
from torchopt.quantize.graph.trace import trace
from torchopt.quantize.targets import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
STATIC = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False, fallback="auto"))]
AUTO = Quantize(fallback="auto")


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Whole kinds of layers would be left by the clock of this machine; here the costs alone decide."""
    monkeypatch.setattr("torchopt.compress.verbs.faster_rules", lambda model, rules, *_: (list(rules), []))


def block(inputs: int, outputs: int, act: nn.Module, **options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, padding=1, bias=False, **options), nn.BatchNorm2d(outputs), act)


class Net(nn.Module):
    """A MobileNetV3's beginning: stem, a residual depthwise block, a wide layer, a head."""

    def __init__(self, act: type[nn.Module] = nn.Hardswish) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = block(3, 16, act(), kernel_size=3, stride=2)
        self.depthwise = block(16, 16, nn.ReLU(), kernel_size=3, groups=16)
        self.wide = block(16, 64, nn.ReLU(), kernel_size=3, stride=2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x)
        return self.head(self.wide(x).mean((2, 3)))


def left(
    model: nn.Module, size: int, target: str = "ort-x86", assigned=("stem.0", "depthwise.0", "wide.0", "head"), config=AUTO
) -> set[str]:
    traced, _ = trace(model.eval(), (torch.randn(1, 3, size, size),))
    return set(leave_front(traced, dict.fromkeys(assigned, config), TARGETS[target]))


def test_many_pixels_and_few_channels_stay_float():
    assert left(Net(), 224) == {"stem.0", "depthwise.0"}


def test_without_fallback_every_layer_runs_as_integers():
    assert left(Net(), 224, config=Quantize()) == set()


@pytest.mark.parametrize(
    ("model", "size", "target", "assigned"),
    [
        (Net(nn.ReLU), 224, "ort-x86", ("stem.0", "depthwise.0", "wide.0", "head")),
        (Net(), 32, "ort-x86", ("stem.0", "depthwise.0", "wide.0", "head")),
        (Net(), 224, "ort-arm", ("stem.0", "depthwise.0", "wide.0", "head")),
        (Net(), 224, "ort-x86", ("depthwise.0", "wide.0", "head")),
    ],
    ids=["no gate", "few pixels", "no costs measured", "the user has decided"],
)
def test_all_that_is_asked_runs_as_integers(model, size, target, assigned):
    assert left(model, size, target, assigned) == set()


def test_the_integers_begin_at_one_value_and_the_rest_is_reported(tmp_path):
    model, x = Net().eval(), torch.randn(2, 3, 224, 224)
    ready = torchopt.prepare(model, STATIC, (x[:1],)).eval()
    skipped = {s.name: s.reason for s in ready.torchopt_state.skipped}
    assert sorted(skipped) == ["depthwise.0", "stem.0"]
    assert "integers take 0." in skipped["stem.0"]
    assert "ms longer than floats by the costs measured for ort-x86" in skipped["stem.0"]
    torchopt.calibrate(ready, [x], progress=False)
    final = torchopt.finalize(ready).eval()
    with torch.no_grad():
        torch.testing.assert_close(final(x), ready(x), rtol=0, atol=0)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert placement.integer == ["wide.0.weight", "head.weight"]
    assert placement.kernels["QuantizeLinear"] == 1
    assert not {"QLinearAdd", "QLinearMul"} & set(placement.kernels)
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).within_one_step == 1.0


def test_a_residual_behind_the_entrance_runs_as_integers(tmp_path):
    class Behind(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.wide(self.stem(x))
            return self.head((x + self.again(x)).mean((2, 3)))

    model, x = Behind(), torch.randn(1, 3, 224, 224)
    model.again = block(64, 64, nn.ReLU(), kernel_size=3)
    model.eval()
    final = torchopt.one_shot(model, STATIC, [x], example_inputs=(x,), progress=False).eval()
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    kernels = torchopt.inspect(tmp_path / "m.onnx").kernels
    assert (kernels["QLinearAdd"], kernels["QLinearConv"]) == (1, 2)
    assert kernels["QuantizeLinear"] == 1


def test_the_marks_are_no_part_of_the_model():
    model = Net().eval()
    traced, _ = trace(Net().eval(), (torch.randn(1, 3, 224, 224),))
    leave_front(traced, dict.fromkeys(("stem.0", "depthwise.0", "wide.0", "head"), AUTO), TARGETS["ort-x86"])
    assert [n.name for n in traced.graph.nodes if n.meta.get(ENTRANCE)] == ["add"]
    ready = torchopt.prepare(model, STATIC, (torch.randn(1, 3, 224, 224),))
    assert not any(name.startswith("_torchopt") for m in model.modules() for name in vars(m))
    torchopt.calibrate(ready, [torch.randn(1, 3, 224, 224)], progress=False)
    final = torchopt.finalize(ready)
    assert not any(name.startswith("_torchopt") for m in final.modules() for name in vars(m) if m is not final)
