"""What scores gather when a step overflows, on several ranks, and what is said when a ranking empties a layer."""

import threading

import pytest
import torch
from torch import nn

import torchopt
from torchopt.network.weights import weights
from torchopt.prune import attach, finish, gathering
from torchopt.prune.score import add_inputs

Prune, Rule = torchopt.Prune, torchopt.Rule


@pytest.mark.parametrize("score", ["taylor", "movement"])
def test_a_step_that_mixed_precision_skips_is_left_out_and_said(score):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, begin_step=3, frequency=1), score=score)
    masks = []
    for overflow in (False, True):
        model = torchopt.prepare(net, [Rule("*", prune=config)])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(3 + overflow):
            model.zero_grad()
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if step == 3:
                model[0].weight_orig.grad[0, 0] = float("inf")
                with pytest.warns(
                    UserWarning, match=rf"the gradient of 0\.weight holds NaN or infinity; score='{score}' leaves this step"
                ):
                    torchopt.step(model)
            else:
                optimizer.step()
                torchopt.step(model)
        masks.append([model[i].weight_mask.clone() for i in (0, 1)])
        assert [int(mask.sum()) for mask in masks[-1]] == [32, 32]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_wanda_averages_what_the_ranks_have_seen(monkeypatch):
    """Two ranks as two threads that meet in a sum; each sees inputs of its own, and both choose the same masks."""
    barrier, slots = threading.Barrier(2), {}
    ranks = threading.local()

    def all_reduce(tensor):
        slots[ranks.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(slots[0] + slots[1])
        barrier.wait()

    monkeypatch.setattr(gathering.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gathering.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(gathering.dist, "all_reduce", all_reduce)
    results, layers = {}, {}
    for rank in (0, 1):
        torch.manual_seed(0)
        layer = nn.Linear(16, 4)

        attach([(w, Prune(schedule=0.5, score="wanda")) for w in weights(layer)], preserve=False)
        scale = torch.ones(16)
        scale[8 * rank : 8 * rank + 8] = 10.0
        layer(torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)) * scale)
        layers[rank] = layer

    def work(rank):
        ranks.rank = rank

        finish(layers[rank])
        results[rank] = (layers[rank].weight_mask, layers[rank].weight_inputs)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert int(results[0][0].sum()) == 32
    assert bool((results[0][1] > 500).all())  # each half was loud on one of the ranks


def test_inputs_that_overflowed_are_left_out():
    layer = nn.Linear(4, 4)
    total = torch.zeros(4)

    add_inputs(total, layer, torch.tensor([[1.0, float("inf"), 2.0, float("nan")]]))
    assert total.tolist() == [1.0, 0.0, 4.0, 0.0]


def test_a_layer_that_a_global_ranking_empties_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    net[1].weight.data *= 1e-4
    with pytest.warns(
        UserWarning, match=r"scope='global' leaves 1 of 4,096 weights of 1\.weight; .*min_keep to a fraction such as 0\.02"
    ):
        torchopt.one_shot(net, [Rule("*", prune=Prune(schedule=0.9, scope="global"))])
    torchopt.one_shot(net, [Rule("*", prune=Prune(schedule=0.9, scope="global", min_keep=0.02))])  # and no warning
