"""Whole heads removed: from torch's attention, from other people's, with masks, in ONNX Runtime, and through a saved file."""

import copy

import pytest
import torch
from torch import nn

import torchopt
from torchopt.channels import count_macs, skipped_of
from torchopt.channels.layers.attention import HeadAttention, adopt

STEPS, WORDS = torch.randn(2, 6, 8), torch.randint(0, 50, (2, 9))
L = nn.Linear


class Net(nn.Module):
    """Modules by name, and a forward of one's own."""

    def __init__(self, forward, parameters=(), **modules):
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            setattr(self, name, module)
        for name, shape in dict(parameters).items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.1))

    def forward(self, *inputs):
        return self.body(self, *inputs)


class Block(nn.Module):
    """A transformer's block by hand."""

    def __init__(self, **kwargs):
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.attention = nn.MultiheadAttention(64, 4, **kwargs)
        self.wide, self.narrow, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.narrow(self.wide(x).relu()))


@pytest.mark.parametrize("batch_first", [True, False])
def test_whole_heads_go_and_the_embedding_shrinks_by_itself(batch_first, tmp_path):
    torch.manual_seed(0)
    model, x = Block(batch_first=batch_first).eval(), torch.randn(2, 6, 8)
    with torch.no_grad():  # heads 1 and 3 matter
        model.attention.in_proj_weight.view(3, 4, 16, 64)[:, [0, 2]] *= 0.01
    both = torchopt.shrink(model, (x,), ratio=0.5)  # heads are as wide as the embedding again
    assert type(both.attention) is nn.MultiheadAttention
    assert (both.attention.num_heads, both.attention.head_dim, both.attention.embed_dim) == (2, 16, 32)
    assert both.attention.in_proj_weight.shape == (96, 32)
    assert both.wide.out_features == 64

    heads = torchopt.shrink(model, (x,), ratio=0.5, ignore=["embed"])  # the embedding keeps its width, attention does not
    assert isinstance(heads.attention, HeadAttention)
    assert (heads.attention.num_heads, heads.attention.embed_dim) == (2, 64)
    assert heads.attention.out_proj.weight.shape == (64, 32)
    kept = model.attention.in_proj_weight.view(3, 4, 16, 64)[:, [1, 3]].reshape(96, 64)
    torch.testing.assert_close(heads.attention.in_proj_weight, kept, rtol=0, atol=0)
    for small in (both, heads):
        torchopt.save(small, tmp_path / "s.safetensors")
        again = torchopt.load(tmp_path / "s.safetensors", Block(batch_first=batch_first)).eval()
        assert type(again.attention) is type(small.attention)
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


def test_shrunken_attention_in_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    small = torchopt.shrink(Block(batch_first=True).eval(), (x,), ratio=0.5, ignore=["embed"])
    assert isinstance(small.attention, HeadAttention)
    torchopt.export(small, (x,), tmp_path / "a.onnx")
    assert torchopt.verify(small, tmp_path / "a.onnx", [x]).max_relative <= 1e-4


def test_attention_that_loses_nothing_stays_torchs_own():
    model = Block().eval()
    small = torchopt.shrink(model, (STEPS,), ratio=0.5, ignore=["embed", "attention"])
    assert type(small.attention) is nn.MultiheadAttention
    assert small.attention._qkv_same_embed_dim
    assert small.wide.out_features == 64


MASKS = {
    "none": lambda b, t, s: {},
    "boolean": lambda b, t, s: {"attn_mask": torch.rand(t, s) > 0.8},
    "float": lambda b, t, s: {"attn_mask": torch.randn(t, s)},
    "a mask a head": lambda b, t, s: {"attn_mask": torch.rand(b * 4, t, s) > 0.8},
    "padding": lambda b, t, s: {"key_padding_mask": torch.arange(s).expand(b, s) > s - 2},
    "both": lambda b, t, s: {"attn_mask": torch.rand(t, s) > 0.8, "key_padding_mask": torch.arange(s).expand(b, s) > s - 2},
    "causal": lambda b, t, s: {"attn_mask": torch.ones(t, s, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 10}]
)
def test_attention_equals_torchs(mask, options):
    for batch_first, need_weights, average in ((True, True, False), (False, True, True), (False, False, True)):
        torch.manual_seed(0)
        if mask == "causal" and ("add_bias_kv" in options or "add_zero_attn" in options):
            continue  # there torch shows the added keys to all queries, or to none, as need_weights has it
        theirs = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options).eval()
        ours = copy.deepcopy(theirs)
        adopt(ours)
        torch.nn.init.normal_(theirs.out_proj.weight, std=0.1)
        ours.load_state_dict(theirs.state_dict())
        lengths = (5, 7)
        q, k, v = (
            torch.randn(2, n, d)
            for n, d in zip((*lengths, 7), (32, options.get("kdim", 32), options.get("vdim", 32)), strict=True)
        )
        arguments = MASKS[mask](2, *lengths) | {"need_weights": need_weights, "average_attn_weights": average}
        if "attn_mask" in arguments and arguments["attn_mask"].dtype == torch.bool:
            arguments["attn_mask"][..., 0] = False  # a row that may look at nothing is NaN
        inputs = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
        expected, weights = theirs(*inputs, **arguments)
        got, ours_weights = ours(*inputs, **arguments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (weights is None) == (ours_weights is None)
        if weights is not None:
            torch.testing.assert_close(ours_weights, weights, rtol=1e-4, atol=1e-5)


def test_attention_without_a_batch_and_its_refusals():
    attention = nn.MultiheadAttention(32, 4).eval()
    x = torch.randn(5, 32)
    expected = attention(x, x, x, key_padding_mask=torch.arange(5) > 3)[0]
    adopt(attention)
    torch.testing.assert_close(attention(x, x, x, key_padding_mask=torch.arange(5) > 3)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        torchopt.DataError, match="attn_mask has 6 rows; one for each of 1 examples × 4 heads that are left is needed"
    ):
        attention(x, x, x, attn_mask=torch.zeros(6, 5, 5))
    with pytest.raises(torchopt.DataError, match="is_causal=True and no attn_mask; give the causal mask too"):
        attention(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_of_torch(padded):
    """Its fused kernels read the parameters themselves: a smaller attention must not take that way."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = Net(
        lambda s, x, *m: s.head(s.t(s.e(x), src_key_padding_mask=m[0] if m else None)),
        e=L(8, 64),
        t=nn.TransformerEncoder(layer, 2),
        head=L(64, 5),
    ).eval()
    inputs = (STEPS, torch.tensor([[False] * 6, [False] * 4 + [True] * 2])) if padded else (STEPS,)
    small = torchopt.shrink(model, inputs, ratio=0.5)
    assert [layer.self_attn.num_heads for layer in small.t.layers] == [2, 2]
    assert (small.e.out_features, small.t.layers[0].linear1.out_features) == (32, 64)
    with torch.no_grad():
        fast = small(*inputs)
    torch.testing.assert_close(small(*inputs).detach()[0], fast[0])


@pytest.mark.filterwarnings("ignore")
def test_encoder_and_decoder_of_torch():
    model = Net(lambda s, x, y: s.h(s.t(s.e(x), s.e(y))), e=L(8, 64), t=nn.Transformer(64, 4, 1, 1, 128), h=L(64, 5)).eval()
    small = torchopt.shrink(model, (torch.randn(6, 2, 8), torch.randn(5, 2, 8)), ratio=0.5)
    assert (small.t.d_model, small.t.decoder.layers[0].multihead_attn.num_heads) == (32, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_of_hugging_face(attention, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 50}
    config = transformers.BertConfig(**sizes, attn_implementation=attention)
    build = lambda: Net(lambda s, x: s.bert(x).logits, bert=transformers.BertForSequenceClassification(config))
    torch.manual_seed(0)
    model = build().eval()
    small = torchopt.shrink(model, (WORDS,), ratio=0.5)
    layer = small.bert.bert.encoder.layer[0]
    assert layer.attention.self.query.weight.shape == (32, 32)
    assert layer.attention.output.dense.weight.shape == (32, 32)
    assert layer.intermediate.dense.out_features == 64
    assert count_macs(small, (WORDS,))[0] < 0.3 * count_macs(model, (WORDS,))[0]
    assert skipped_of(small) == []
    torchopt.export(small, (WORDS,), tmp_path / "b.onnx")
    assert torchopt.verify(small, tmp_path / "b.onnx", [WORDS]).max_relative <= 1e-4
    torchopt.save(small, tmp_path / "b.safetensors")
    torch.testing.assert_close(torchopt.load(tmp_path / "b.safetensors", build()).eval()(WORDS), small(WORDS), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_llama_of_hugging_face_loses_heads_with_their_group():
    """Two query heads share a key head: they go together."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
    }
    model = Net(
        lambda s, x: s.m(x).logits,
        m=transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, use_cache=False, **sizes)),
    ).eval()
    small = torchopt.shrink(model, (WORDS,), ratio=0.5)
    attention = small.m.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (32, 16, 32)
    assert small.m.model.embed_tokens.embedding_dim == 32
    assert small(WORDS).shape == (2, 9, 50)
