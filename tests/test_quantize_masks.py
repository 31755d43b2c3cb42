"""Attention under masks, given as buffers, arguments or padding: every linear layer integer, torch's numbers in the file."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
RULES = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]
LENGTH = 6
LATER = torch.ones(LENGTH, LENGTH).triu(1).bool()
ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(LATER, -torch.inf)
PADDED = torch.zeros(4, LENGTH, dtype=torch.bool)
PADDED[1, 4:] = True


class Block(nn.Module):
    """One pre-norm block around `scaled_dot_product_attention`; a mask of its own, or one that it is given."""

    def __init__(self, mask: torch.Tensor | None = None, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.head = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 10)
        self.causal = causal
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask if added is None else added[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.head(x + self.out(y.transpose(1, 2).reshape(n, length, 32)))


class Multihead(nn.Module):
    """The same around torch's own module."""

    def __init__(self, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor, padded: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(x + self.attention(x, x, x, attn_mask=self.mask, key_padding_mask=padded, need_weights=False)[0])


X = torch.randn(4, LENGTH, 32, generator=torch.Generator().manual_seed(0))
CASES = {
    "none": (Block, {}, {}),
    "causal": (Block, {"causal": True}, {}),
    "added": (Block, {"mask": ADDED}, {}),
    "kept": (Block, {"mask": ~LATER}, {}),
    "given": (Block, {}, {"added": torch.zeros(4, LENGTH).masked_fill(PADDED, -torch.inf)}),
    "multihead added": (Multihead, {"mask": ADDED}, {}),
    "multihead left out": (Multihead, {"mask": LATER}, {}),
    "multihead padded": (Multihead, {}, {"padded": PADDED}),
    "multihead both": (Multihead, {"mask": LATER}, {"padded": PADDED}),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_attention_is_integer_and_exported_right(name, tmp_path):
    make, options, given = CASES[name]
    torch.manual_seed(0)
    model, inputs = make(**options).eval(), {"x": X, **given}
    example = tuple(value[:1] for value in inputs.values())
    final = torchopt.one_shot(model, RULES, [inputs], example_inputs=example, progress=False).eval()
    torchopt.export(final, example, tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert len(placement.integer) == sum(isinstance(m, nn.Linear | nn.MultiheadAttention) for m in model.modules())
    assert not placement.float
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [inputs], progress=False)
    assert verdict.weights_equal
    assert verdict.within_one_step >= 0.99
    with torch.no_grad():
        assert float((final(**inputs) - model(**inputs)).norm() / model(**inputs).norm()) < 0.03


def test_a_batch_of_infinities_that_is_no_mask_is_refused():
    ready = torchopt.prepare(Block().eval(), RULES, (X[:1],)).eval()
    broken = X.clone()
    broken[0, 0, 0] = -torch.inf
    with pytest.raises(torchopt.TorchoptError, match="batch 0 holds NaN or infinity"):
        torchopt.calibrate(ready, [broken], progress=False)


def test_a_decoder_whose_code_asks_its_mask_says_how_to_decide_beforehand(tmp_path):
    class Decoder(nn.Module):
        def __init__(self, **how) -> None:
            super().__init__()
            self.inner, self.how = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1), how
            self.register_buffer("mask", ADDED)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.inner(x, memory, tgt_mask=self.mask, **self.how)

    with pytest.raises(torchopt.TorchoptError, match="tgt_is_causal=True"):
        torchopt.export(Decoder().eval(), (X[:1], X[:1]), tmp_path / "m.onnx")
    model = Decoder(tgt_is_causal=True).eval()
    final = torchopt.one_shot(model, RULES, [(X, X.flip(1))], example_inputs=(X[:1], X[:1]), progress=False).eval()
    torchopt.export(final, (X[:1], X[:1]), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert not placement.float
    assert (
        placement.kernels["MatMulIntegerToFloat"] == 7
    )  # the projection of queries, keys and values once each tensor, twice here
    assert torchopt.verify(final, tmp_path / "m.onnx", [(X, X.flip(1))], progress=False).within_one_step >= 0.99
