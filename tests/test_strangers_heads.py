"""Attention that has lost heads is quantized as any other: all its layers on integers."""

import torch
from torch import nn

import torchopt


class Net(nn.Module):
    """One attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn, self.head = nn.Linear(16, 32), nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head((y + self.attn(y, y, y, need_weights=False)[0]).mean(1))


def test_all_layers_are_integers_after_heads_are_removed(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 12, 16)
    small = torchopt.shrink(net, (x[:1],), ratio=0.5, ignore=("stem", "head"))
    assert tuple(small.attn.in_proj_weight.shape) == (48, 32), "half of the heads, and the embedding as it was"
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize())]
    final = torchopt.one_shot(small, rules, [x], example_inputs=(x[:1],), progress=False)
    assert torchopt.report(final).skipped == []
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (len(placement.integer), placement.float) == (4, [])
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert (verdict.weights_equal, verdict.weights_compared, verdict.within_one_step) == (True, 4, 1.0)
    with torch.no_grad():
        assert float((final(x) - small(x)).norm() / small(x).norm()) < 0.05
