"""The default of post-training quantization: ranges with the least error at the outputs, rounding by least squares."""

import math

import pytest
import torch
from torch import nn

import torchopt
from torchopt import ConstantSparsity, Prune, Quantize, Rule
from torchopt.quantize import ActivationQuantizer
from torchopt.quantize.corrections.least_squares import _rounded
from torchopt.quantize.observers.histogram import StreamingHistogram

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(64, 1, 16, 16, generator=GENERATOR)


class Deaf(nn.Module):
    """Reads its second channel a thousand times less than its first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        self.first.weight.data = torch.eye(2)[:, :, None, None]
        self.second.weight.data = torch.tensor([[1.0, 1e-3]])[:, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def calibrated(model: nn.Module, x: torch.Tensor, **config: object) -> nn.Module:
    ready = torchopt.prepare(model.eval(), [Rule("*", quantize=Quantize(**config))], (x[:1],))
    return torchopt.calibrate(ready, list(x.split(16)), progress=False).eval()


def quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


def decibels(model: nn.Module, reference: torch.Tensor, x: torch.Tensor) -> float:
    with torch.no_grad():
        return 10 * math.log10(float(reference.var() / (model(x) - reference).square().mean()))


def test_values_that_the_output_hardly_reads_are_clipped():
    x = torch.randn(64, 2, 4, 4, generator=GENERATOR) * torch.tensor([1.0, 50.0])[:, None, None]
    rough = {"rounding": "nearest", "equalize": False}
    middle = quantizers(calibrated(Deaf(), x, **rough))[1]
    plain = quantizers(calibrated(Deaf(), x, observer="mse", **rough))[1]
    assert float(plain.max_val) > 100  # the squared error of the tensor itself looks at the loud channel
    assert float(middle.max_val) < 10  # the output reads the quiet one


def test_weighted_histogram_counts_weights():
    histogram = StreamingHistogram()
    histogram.observe(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.0, 2.0]))
    assert float(histogram.counts.sum()) == 2.5
    assert (float(histogram.low), float(histogram.high)) == (0.0, 2.0)


def test_auto_needs_no_labels_no_grad_of_parameters_and_leaves_none():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)).requires_grad_(False)
    ready = calibrated(model, DATA)
    assert all(q.calibrated for q in quantizers(ready))
    assert all(p.grad is None for p in ready.parameters())


def test_outputs_without_gradient_fall_back_to_the_extremes():
    class Winner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).argmax(1)

    x = torch.randn(64, 8, generator=GENERATOR)
    (entry, *_) = quantizers(calibrated(Winner(), x))
    assert float(entry.max_val) == float(x.max())
    assert float(entry.min_val) == float(x.min())


def test_least_squares_keeps_the_sum_that_rounding_to_nearest_loses():
    # inputs are all equal: only the sum of the weights matters. Nearest rounds 0.4 + 0.4 + 0.4 + 0.4 to 0, the sum is 1.6
    rows = torch.full((1, 1, 4), 0.4, dtype=torch.float64)
    gram = torch.ones(1, 4, 4, dtype=torch.float64)
    codes = _rounded(rows, gram, torch.ones_like(rows), 7)
    assert abs(float(codes.sum()) - 1.6) <= 0.5
    assert float(rows.round().sum()) == 0.0


@pytest.mark.parametrize("bits", [4, 8])
def test_least_squares_beats_nearest_at_the_output(bits):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 144, 10)
    ).eval()
    x = DATA + 2  # images have a mean
    with torch.no_grad():
        reference = model(x)
    rough = decibels(calibrated(model, x, weight_bits=bits, rounding="nearest", activation_bits=16), reference, x)
    ours = decibels(calibrated(model, x, weight_bits=bits, activation_bits=16), reference, x)
    assert ours > rough + 3


def test_zeros_of_a_mask_stay_zero_and_the_rounded_weight_is_what_is_baked(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 4)).eval()
    rule = Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.75, frequency=1)), quantize=Quantize())
    final = torchopt.one_shot(model, [rule], list(DATA.split(16)), example_inputs=(DATA[:1],), progress=False).eval()
    for name in ("0", "2", "4"):
        weight = final.get_submodule(name).weight
        assert float((weight == 0).float().mean()) >= 0.74
    path = tmp_path / "model.onnx"
    torchopt.export(final, (DATA[:1],), path)
    assert torchopt.verify(final, path, [DATA]).weights_equal


def test_calibration_is_deterministic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 196, 4)).eval()
    one, other = calibrated(model, DATA), calibrated(model, DATA)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
