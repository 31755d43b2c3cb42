"""Transposed convolutions run as integer convolutions: the same numbers, the weight in the file as torch has it, no float kernel left."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.pack.pack import decode_initializers

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
RULES = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]
LAYERS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
SIZES = {1: (12,), 2: (7, 9), 3: (5, 4, 6)}
FORMS = {
    "stride 1": {"kernel_size": 3},
    "dilated": {"kernel_size": 3, "padding": 1, "dilation": 2},
    "U-Net's": {"kernel_size": 2, "stride": 2},
    "DCGAN's": {"kernel_size": 4, "stride": 2, "padding": 1},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"kernel_size": 5, "stride": 3, "padding": 2, "output_padding": 2, "groups": 2, "bias": False},
    "gaps": {"kernel_size": 2, "stride": 3, "output_padding": 1},
    "cut": {"kernel_size": 7, "stride": 2, "padding": 4},
}


def net(rank: int, **form) -> nn.Module:
    torch.manual_seed(0)
    conv, transposed = LAYERS[rank]
    return nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), transposed(8, 32, **form), nn.ReLU(), conv(32, 8, 1), nn.ReLU())


def compressed(model: nn.Module, x: torch.Tensor, path, **options):
    final = torchopt.one_shot(model.eval(), RULES, [x], example_inputs=(x[:1],), progress=False).eval()
    torchopt.export(final, (x[:1],), path, **options)
    return final, torchopt.verify(final, path, [x], progress=False), torchopt.inspect(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", LAYERS)
def test_every_form_gives_torchs_numbers_as_integers(rank, form, tmp_path):
    x = torch.randn(3, 3, *SIZES[rank])
    _, verdict, placement = compressed(net(rank, **FORMS[form]), x, tmp_path / "m.onnx")
    assert verdict.weights_equal, verdict.first_difference
    assert verdict.weights_compared == 3
    assert verdict.max_steps <= 1.01
    assert placement.kernels["QLinearConv"] == len(placement.integer) == 3
    assert "ConvTranspose" not in placement.kernels


@pytest.mark.parametrize("form", [{"kernel_size": 3, "stride": 2, "dilation": 2}, {"kernel_size": 4, "stride": 2, "groups": 4}])
def test_what_integers_make_slower_stays_a_float_kernel_on_the_same_numbers(form, tmp_path):
    _, verdict, placement = compressed(net(2, **form), torch.randn(3, 3, 7, 9), tmp_path / "m.onnx")
    assert verdict.weights_equal
    assert verdict.max_steps <= 1.01
    assert placement.float == ["2.weight"]
    assert placement.kernels["ConvTranspose"] == 1


@pytest.mark.parametrize("pack", [True, False])
def test_the_file_holds_the_weight_as_torch_has_it(pack, tmp_path):
    path = tmp_path / "m.onnx"
    final, verdict, _ = compressed(net(2, kernel_size=3, stride=2, padding=1), torch.randn(2, 3, 8, 8), path, pack=pack)
    assert verdict.weights_equal
    np.testing.assert_array_equal(decode_initializers(path)["2.weight"], final.get_submodule("2").weight.detach().numpy())
    if not pack:
        stored = {i.name: i for i in onnx.load(path).graph.initializer}["2.weight"]
        assert list(stored.dims) == [8, 32, 3, 3]
        assert stored.data_type == onnx.TensorProto.INT8


def test_batch_and_layout_stay_free_and_one_transposition_is_left(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    _, verdict, placement = compressed(
        net(2, kernel_size=2, stride=2), x, tmp_path / "m.onnx"
    )  # exported with one, run with four
    assert verdict.samples == 4
    assert placement.kernels["Transpose"] == 3  # of the input, of the output, and this one
    assert placement.kernels["QuantizeLinear"] == placement.kernels["DequantizeLinear"] == 1


class UNet(nn.Module):
    """Two levels; upwards by transposed convolutions, or nearest neighbours and a convolution."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.down, self.deep = self._block(3, 16), self._block(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2) if transposed else nn.Conv2d(32, 16, 1)
        self.join, self.out = self._block(32, 16), nn.Conv2d(16, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.down(x)
        deep = self.up(self.deep(F.max_pool2d(side, 2)))
        deep = deep if self.transposed else F.interpolate(deep, scale_factor=2)
        return self.out(self.join(torch.cat([side, deep], 1)))


@pytest.mark.parametrize("transposed", [True, False])
def test_a_decoder_with_skips_is_integer_throughout(transposed, tmp_path):
    torch.manual_seed(0)
    _, verdict, placement = compressed(UNet(transposed), torch.randn(2, 3, 16, 16), tmp_path / "m.onnx")
    assert verdict.weights_equal
    assert verdict.max_steps <= 1.01
    assert not placement.float
    assert placement.kernels["QuantizeLinear"] == placement.kernels["DequantizeLinear"] == 1
    assert placement.kernels["QLinearConcat"] == 1
    assert not {"Conv", "ConvTranspose", "Concat", "Relu", "Clip"} & set(placement.kernels)
