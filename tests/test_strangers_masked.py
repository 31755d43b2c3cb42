"""Masks over coupled channels, and `shrink(masked=True)`, which removes exactly them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchopt

Prune, Rule = torchopt.Prune, torchopt.Rule
C, L, S = nn.Conv2d, nn.Linear, nn.Sequential
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = Prune(schedule=0.5, pattern="channel", scope="coupled")


def lively(net: nn.Module) -> nn.Module:
    """Batch norms that shift, as after training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return net.eval()


class Residual(nn.Module):
    """A stem and two blocks whose sums couple three convolutions, and a gate whose zero is one half."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = C(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b, self.between = C(16, 24, 3, padding=1, bias=False), C(24, 16, 3, padding=1), nn.BatchNorm2d(24)
        self.depth, self.gate, self.head = C(16, 16, 3, padding=1, groups=16), C(16, 16, 1), L(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.relu(self.between(self.a(x))))
        x = self.depth(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(Residual())


def test_what_is_masked_is_what_shrink_removes():
    net = residual()
    masked = torchopt.one_shot(net, [Rule("*", prune=HALF)], example_inputs=(X,))
    rows = lambda weight: [i for i, row in enumerate(weight.flatten(1)) if not row.any()]
    gone = rows(masked.stem.weight)
    assert len(gone) == 8
    assert gone == rows(masked.b.weight) == rows(masked.depth.weight) == rows(masked.head.weight.T)
    assert len(rows(masked.a.weight)) == 12
    for tensor in (masked.norm.weight, masked.norm.bias, masked.stem.bias, masked.b.bias):
        assert rows(tensor[:, None]) == gone
    small = torchopt.shrink(masked, (X,), masked=True)
    assert [getattr(small, n).out_channels for n in ("stem", "a", "b", "depth", "gate")] == [8, 12, 8, 8, 8]
    torch.testing.assert_close(small(X), masked(X), rtol=1e-5, atol=1e-6)
    assert float((small(X) - net(X)).detach().abs().max()) > 0.05


def test_masks_are_trained_saved_and_baked(tmp_path):
    prune = Prune(
        schedule=torchopt.PolynomialDecay(final_sparsity=0.5, begin_step=0, end_step=4, frequency=2),
        pattern="channel",
        scope="coupled",
        score="taylor",
    )
    rules = [Rule("*", prune=prune)]
    model = torchopt.prepare(residual(), rules, (X,)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        torchopt.step(model)
        if step == 1:
            torchopt.save(model, tmp_path / "m.safetensors")
            again = torchopt.load(tmp_path / "m.safetensors", residual())
            assert torch.equal(again.norm.bias_mask, model.norm.bias_mask)
            assert int(again.a.weight_mask.flatten(1).any(1).sum()) == round(24 * (1 - 0.5 * (1 - 0.5**3)))
    final = torchopt.finalize(model).eval()
    small = torchopt.shrink(final, (X,), masked=True)
    assert (small.stem.out_channels, small.a.out_channels) == (8, 12)
    torch.testing.assert_close(small(X), final(X), rtol=1e-4, atol=1e-5)
    column = int(model.a.weight_mask.any(0).flatten(1).any(1).nonzero()[0])
    model.a.weight_mask[:, column] = False
    with pytest.raises(torchopt.StateError, match=r"the mask of \S+ keeps"):
        torchopt.finalize(model)


def test_masks_of_rows_alone_are_refused_with_the_remedy():
    torch.manual_seed(0)
    net = lively(S(C(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), C(32, 5, 1)))
    rows = torchopt.one_shot(net, [Rule("0", prune=Prune(schedule=0.5, pattern="channel"))])
    with pytest.raises(
        torchopt.ModelError, match=r"no masked channel can be removed; 0 keeps .*scope='coupled'\) masks what is coupled"
    ):
        torchopt.shrink(rows, (X,), masked=True)
    with pytest.raises(torchopt.ModelError, match="masked=True, and no weight of a width that can shrink is zero along"):
        torchopt.shrink(net, (X,), masked=True)
    plain = S(C(3, 32, 3, bias=False), nn.ReLU(), C(32, 5, 1)).eval()
    rows = torchopt.one_shot(plain, [Rule("0", prune=Prune(schedule=0.5, pattern="channel"))])
    small = torchopt.shrink(rows, (X,), masked=True)
    assert small[0].out_channels == 16
    torch.testing.assert_close(small(X), rows(X), rtol=1e-5, atol=1e-6)


def test_channels_of_a_layer_norm_are_left_alone_and_said():
    torch.manual_seed(0)
    net = S(L(8, 32), nn.LayerNorm(32), L(32, 16), nn.ReLU(), L(16, 3)).eval()
    x = torch.randn(4, 8)
    model = torchopt.prepare(net, [Rule("*", prune=HALF)], (x,))
    assert [s.name for s in torchopt.report(model).skipped] == ["0", "4"]
    torchopt.step(model)
    small = torchopt.shrink(torchopt.finalize(model), (x,), masked=True)
    assert [small[i].out_features for i in (0, 2)] == [32, 8]


def test_bad_rules():
    net = residual()
    with pytest.raises(torchopt.ConfigError, match="scope: got 'coupled' with pattern='element'; coupled channels need"):
        Prune(schedule=0.5, scope="coupled")
    with pytest.raises(torchopt.ConfigError, match="scope='coupled' needs example_inputs"):
        torchopt.prepare(net, [Rule("*", prune=HALF)])
    other = Prune(schedule=0.25, pattern="channel", scope="coupled")
    with pytest.raises(torchopt.ConfigError, match="rules with scope='coupled' differ"):
        torchopt.prepare(net, [Rule("a", prune=other), Rule("*", prune=HALF)], (X,))
    with pytest.raises(torchopt.RuleError, match="can mask nothing; stem shares its channels with"):
        torchopt.prepare(net, [Rule("stem", prune=HALF)], (X,))
    with pytest.raises(torchopt.RuleError, match="and another rule masks it; give one"):
        torchopt.prepare(net, [Rule("b", prune=Prune(schedule=0.5)), Rule("a", prune=HALF)], (X,))
    with pytest.raises(torchopt.ConfigError, match=r"got \['ratio', 'masked'\]; give exactly one"):
        torchopt.shrink(net, (X,), ratio=0.5, masked=True)
