"""Latency as a limit and as what becomes small: what is told is what was measured, and a limit below all is refused."""

import pytest
import torch
from torch import nn

import torchopt

CHOICES = torchopt.Choices(sparsities=(0.5,), values=(16,))


def searched(**limits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    x = torch.randn(128, 3, 16, 16)
    return torchopt.search(model.eval(), batches=x, choices=CHOICES, cache=False, trials=3, progress=False, **limits)


@pytest.mark.slow
def test_the_fastest_at_a_given_loss_was_timed_and_keeps_its_score():
    found = searched(max_drop=0.05, objective="latency")
    assert found.point.latency_ms > 0
    assert found.point.score >= 0.95


@pytest.mark.slow
def test_a_limit_on_latency_is_kept_by_what_was_measured_or_refused_with_the_nearest():
    assert searched(max_latency_ms=1000.0).point.latency_ms < 1000
    with pytest.raises(torchopt.TargetError, match=r"max_latency_ms=1e-06 cannot be met .* the nearest point takes"):
        searched(max_latency_ms=1e-6)
