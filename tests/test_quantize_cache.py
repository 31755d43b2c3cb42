"""Calibration caches: what a second quantization makes of the file, and which files and models are refused."""

import json

import pytest
import torch
from torch import nn

import torchopt
from torchopt import FileError, Quantize, Rule, StateError

DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLAIN = {"equalize": False, "rounding": "nearest"}


def prepared(**config):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 5)).eval()
    return torchopt.prepare(net, [Rule("*", quantize=Quantize(**{**PLAIN, **config}))], (DATA[:1],))


def saved(path, **config):
    model = torchopt.calibrate(prepared(**config), DATA.split(8), progress=False)
    torchopt.save_ranges(model, path)
    return model


@pytest.mark.parametrize("observer", ["auto", "minmax", "moving_average", "percentile", "mse", "entropy"])
def test_a_second_quantization_needs_no_data_and_is_equal_bit_for_bit(tmp_path, observer):
    first, second = saved(tmp_path / "a.json", observer=observer), prepared(observer=observer)
    torchopt.load_ranges(second, tmp_path / "a.json")
    assert torch.equal(torchopt.finalize(second)(DATA), torchopt.finalize(first)(DATA))


def test_models_that_data_corrects_are_refused(tmp_path):
    for field in ({"equalize": True}, {"rounding": "least_squares"}, {"bias_correction": True}):
        with pytest.raises(StateError, match=r"load_ranges: calibration corrects the weights of 0 too.*torchopt.save"):
            torchopt.load_ranges(prepared(**field), tmp_path / "a.json")


def test_an_uncalibrated_model_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"save_ranges: quantizer_0 has not seen any data"):
        torchopt.save_ranges(prepared(), tmp_path / "a.json")


def test_another_model_and_another_grid_are_refused_and_nothing_changes(tmp_path):
    saved(tmp_path / "a.json")
    other = torchopt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [Rule("*", quantize=Quantize(**PLAIN))], (DATA[:1],))
    with pytest.raises(
        StateError, match=r"the model has 1 quantized layers and 2 ranges, .*\(2 and 2\); the network and the rules"
    ):
        torchopt.load_ranges(other, tmp_path / "a.json")
    wide = prepared(activation_bits=16)
    with pytest.raises(StateError, match=r"has the grid .*65535, the file \[0, 255\]; the same activation_bits"):
        torchopt.load_ranges(wide, tmp_path / "a.json")
    with pytest.raises(StateError, match="has not seen any data"):
        torchopt.finalize(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no activation ranges of version 1"),
        ('{"torchopt_ranges": 2, "ranges": {}}', "holds no activation ranges of version 1"),
        ('{"torchopt_ranges": 1, "ranges": {}}', "names no layers"),
        ('{"torchopt_ranges": 1, "layers": [], "ranges": {"q": 3}}', "q is 3; finite low ≤ high"),
        ('{"torchopt_ranges": 1, "layers": [], "ranges": {"q": {"low": NaN, "high": 1, "grid": [0, 255]}}}', "finite low ≤ high"),
        ('{"torchopt_ranges": 1, "layers": [], "ranges": {"q": {"low": 2, "high": 1, "grid": [0, 255]}}}', "finite low ≤ high"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=message):
        torchopt.load_ranges(prepared(), tmp_path / "a.json")


def test_a_missing_file_is_refused_and_the_file_is_plain_json(tmp_path):
    with pytest.raises(FileError, match="cannot be read"):
        torchopt.load_ranges(prepared(), tmp_path / "none.json")
    saved(tmp_path / "a.json")
    assert set(json.loads((tmp_path / "a.json").read_text())["ranges"]["quantizer_0"]) == {"low", "high", "grid"}
