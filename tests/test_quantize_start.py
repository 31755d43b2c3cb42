"""How a range starts in training: as the union of the first ten batches, then as an average; state, old checkpoints, calibration."""

import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize.layers.activations import START, TRAINING_MOMENTUM, ActivationQuantizer


def ends(quantizer):
    return [round(float(quantizer.min_val), 6), round(float(quantizer.max_val), 6)]


def test_three_batches_give_the_range_of_all_three():
    """[-1, 1], [-3, 0], [0, 2] make [-3, 2]: an average with 0.01 would stay at about [-1, 1] and cut what came later."""
    quantizer = ActivationQuantizer().train()
    for batch in ([-1.0, 1.0], [-3.0, 0.0], [0.0, 2.0]):
        quantizer(torch.tensor(batch))
    assert ends(quantizer) == [-3.0, 2.0]
    assert abs(float(quantizer.scale) - 5 / 255) < 1e-7


def test_after_ten_batches_it_is_an_average():
    quantizer = ActivationQuantizer().train()
    for _ in range(START):
        quantizer(torch.tensor([-1.0, 1.0]))
    quantizer(torch.tensor([-2.0, 0.0]))
    assert ends(quantizer) == [-1 - TRAINING_MOMENTUM, 1 - TRAINING_MOMENTUM]


def test_calibration_is_a_start():
    quantizer = ActivationQuantizer().train()
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    quantizer(torch.tensor([-2.0, 0.0]))
    assert ends(quantizer) == [-1 - TRAINING_MOMENTUM, 1 - TRAINING_MOMENTUM]


def test_the_count_is_state_and_an_old_checkpoint_has_started():
    quantizer, resumed, old = (ActivationQuantizer().train() for _ in range(3))
    for batch in ([-1.0, 1.0], [-3.0, 0.0]):
        quantizer(torch.tensor(batch))
    state = quantizer.state_dict()
    resumed.load_state_dict(state)
    old.load_state_dict({name: value for name, value in state.items() if name != "batches"})
    for one in (quantizer, resumed, old):
        one(torch.tensor([0.0, 2.0]))
    assert ends(resumed) == ends(quantizer) == [-3.0, 2.0]
    assert ends(old) == [round(-3 + 3 * TRAINING_MOMENTUM, 6), round(1 + TRAINING_MOMENTUM, 6)]


def test_three_steps_of_training_are_as_near_as_calibration_on_the_same_batches():
    """Batches of which one has the largest inputs: at most 1 dB behind min/max calibration on the three (5 dB behind before)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    batches = [torch.randn(32, 16) * size for size in (1.0, 1.5, 4.0)]
    test = torch.cat(batches)
    wanted = model(test).detach()

    def decibels(other):
        return float(10 * torch.log10(wanted.var() / (other.eval()(test).detach() - wanted).square().mean()))

    plain = Quantize(observer="minmax", equalize=False, bias_correction=False, rounding="nearest")
    calibrated = torchopt.one_shot(model, [Rule("*", quantize=plain)], batches, example_inputs=(test[:1],), progress=False)
    prepared = torchopt.prepare(model, [Rule("*", quantize=Quantize())], (test[:1],)).train()
    for batch in batches:
        prepared(batch)
    assert decibels(prepared) > decibels(calibrated) - 1
