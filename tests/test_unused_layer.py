"""A layer whose result nobody reads, as the last skip of a WaveNet: compressed networks are the same without it."""

import torch
from torch import nn

from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule, one_shot, prepare, report
from torchopt.state.counter import ATTRIBUTE


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        self.last(h)
        return h


def test_all_three_techniques_leave_it_alone_and_say_so() -> None:
    torch.manual_seed(0)
    net, x = Unread().eval(), torch.randn(64, 8)
    rule = Rule(
        "*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5)), cluster=Cluster(n_clusters=8), quantize=Quantize()
    )
    ready = prepare(net, [rule], (x[:1],))
    assert [s.technique for s in ready.get_submodule(ATTRIBUTE).skipped if s.name == "last.weight"] == ["prune", "cluster"]
    small = one_shot(net, [rule], [x], example_inputs=(x[:1],), progress=False)
    plain = one_shot(net, [Rule("*", prune=rule.prune, cluster=rule.cluster)], [x], progress=False)
    errors = [(model(x) - net(x)).square().mean() for model in (small, plain)]
    assert errors[0] < errors[1] + 0.003 * net(x).var()
    assert "last" in str(report(ready))
