"""Tables fitted anew to what masks leave have the room that they had."""

import torch
from torch import nn

from torchopt import Cluster, ConstantSparsity, Prune, Rule, one_shot


def test_as_many_values_left_as_clusters_and_a_zero_beside_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 1))  # half of 32 weights stay: 16 values, and the zero is a seventeenth
    rule = Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5)), cluster=Cluster(n_clusters=16))
    weight = one_shot(net, [rule], progress=False)[0].weight
    assert int((weight == 0).sum()) == 16
    assert len(weight.unique()) == 16
    kept = weight != 0
    # Fifteen values stand for sixteen weights: two of them share one, and no other moves.
    assert int((weight[kept] != net[0].weight[kept]).sum()) <= 2
