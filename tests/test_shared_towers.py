"""One tower on two inputs, one head on several levels: each call of a layer is followed by the same norm, which is folded for all."""

import torch
from torch import nn

from torchopt import Quantize, Rule, finalize, one_shot, prepare
from torchopt.quantize.layers.modules import Fused

RULES = [Rule("*", quantize=Quantize())]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()
        )
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(a) - 0.5 * self.tower(b))


def _trained() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    net, x = Towers(), (torch.randn(32, 3, 16, 16), 1.3 * torch.randn(32, 3, 16, 16))
    for _ in range(20):
        net.train()(*x)
    return net.eval(), x


def test_the_norm_is_folded_and_the_defaults_are_as_good_as_elsewhere() -> None:
    net, x = _trained()
    layers = [m for m in prepare(net, RULES, tuple(v[:1] for v in x)).modules() if isinstance(m, Fused)]
    assert [layer.bn is not None for layer in layers] == [True, False, False]
    assert [layer.act is not None for layer in layers] == [True, True, False]
    small = one_shot(net, RULES, [x], example_inputs=tuple(v[:1] for v in x), progress=False).eval()
    with torch.no_grad():
        y, reference = small(*x), net(*x)
    assert 10 * torch.log10(reference.var() / (y - reference).square().mean()) > 30


def test_each_call_moves_the_statistics_as_in_the_float_network() -> None:
    net, x = _trained()
    ready, twin = prepare(net, RULES, tuple(v[:1] for v in x)), _trained()[0]
    ready.train()(*x)
    twin.train()(*x)
    norm = next(m.bn for m in ready.modules() if isinstance(m, Fused) and m.bn is not None)
    torch.testing.assert_close(norm.running_mean, twin.tower[1].running_mean, rtol=1e-4, atol=1e-4)
    assert int(norm.num_batches_tracked) == int(twin.tower[1].num_batches_tracked) == 42
    torch.optim.SGD(ready.parameters(), lr=0.0).step()
    with torch.no_grad():
        torch.testing.assert_close(finalize(ready).eval()(*x), ready.eval()(*x), rtol=0, atol=0)
