"""Batch-norm statistics measured anew: the exact moments of all data, and everything else left alone."""

import pytest
import torch
from torch import nn

from torchopt.errors import DataError, ModelError
from torchopt.network.batch_norm import reestimate_batch_norm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5)
    )


def test_moments_are_those_of_all_batches_together():
    model = network().train()
    batches = [torch.randn(n, 3, 8, 8) * n for n in (4, 7, 2)]
    assert reestimate_batch_norm(model, batches) == 2
    with torch.no_grad():
        values = torch.cat([model[0](x) for x in batches]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(dim=1))
    torch.testing.assert_close(model[1].running_var, values.var(dim=1))


def test_modes_weights_and_counters_are_left_alone():
    model = network().train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" not in key}
    reestimate_batch_norm(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_it_is_deterministic_with_dropout():
    first, second, batches = network(), network(), [torch.randn(8, 3, 8, 8)]
    for model in (first, second):
        reestimate_batch_norm(model, batches)
    assert torch.equal(first[6].running_var, second[6].running_var)


def test_it_repairs_a_pruned_network():
    """Halving the weights shifts every activation; measuring anew restores the normalized outputs."""
    model, x = network().eval(), torch.randn(64, 3, 8, 8)
    reestimate_batch_norm(model, [x])
    with torch.no_grad():
        before = model[1](model[0](x))
        model[0].weight.mul_(0.5)
        model[0].bias.mul_(0.5)
        broken = (model[1](model[0](x)) - before).abs().max()
        reestimate_batch_norm(model, [x])
        torch.testing.assert_close(model[1](model[0](x)), before, atol=2e-3, rtol=1e-3)
    assert broken > 0.5


def test_bad_input_changes_nothing():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"reestimate_batch_norm: no batch came; give at least one"):
        reestimate_batch_norm(model, [])
    with pytest.raises(DataError, match=r"reestimate_batch_norm: a batch leads to values that are not finite"):
        reestimate_batch_norm(model, [torch.full((2, 3, 8, 8), float("nan"))])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(
        ModelError, match=r"reestimate_batch_norm: Linear has no batch norm with running statistics; leave this out"
    ):
        reestimate_batch_norm(nn.Linear(2, 2), [torch.zeros(1, 2)])
