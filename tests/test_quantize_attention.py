"""Attention opened for quantization computes what torch's does, and its projections run as integers."""

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize.layers.attention import OpenAttention, can_open

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
MINMAX = Quantize(observer="minmax", rounding="nearest", equalize=False)


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(32, 4, **options).eval()
    if made.out_proj.bias is not None:
        nn.init.normal_(made.out_proj.bias)
    return made


X, Y, Z = (torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
BOOL = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.3
BOOL.fill_diagonal_(False)
PADDED = torch.zeros(2, 5, dtype=torch.bool)
PADDED[1, 3:] = True
CALLS = {
    "self": ((X, X, X), {}),
    "causal": ((X, X, X), {"attn_mask": BOOL}),
    "float mask": ((X, X, X), {"attn_mask": torch.randn(5, 5)}),
    "a mask a head": ((X, X, X), {"attn_mask": torch.randn(8, 5, 5)}),
    "padding": ((X, X, X), {"key_padding_mask": PADDED, "need_weights": False}),
    "weights of each head": ((X, X, X), {"average_attn_weights": False}),
    "cross": ((X, Y, Y), {}),
    "keys and values": ((X, Y, Z), {"need_weights": False}),
    "no batch": ((X[0], X[0], X[0]), {}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_opened_attention_computes_the_same(name, batch_first):
    args, kwargs = CALLS[name]
    if not batch_first and args[0].dim() == 3:
        turned = {id(x): x.transpose(0, 1) for x in args}
        args = tuple(turned[id(x)] for x in args)  # the same tensor stays the same object
    module = attention(batch_first=batch_first)
    with torch.no_grad():
        expected, weights = module(*args, **kwargs)
        found, shares = OpenAttention(module)(*args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (shares is None) is (weights is None)
    if weights is not None:
        torch.testing.assert_close(shares, weights, rtol=1e-5, atol=1e-6)


def test_opened_attention_has_the_parameters_themselves_and_no_bias_where_there_is_none():
    module = attention(bias=False)
    opened = OpenAttention(module)
    assert opened.in_proj.weight is module.in_proj_weight
    assert opened.out_proj.weight is module.out_proj.weight
    assert opened.in_proj_bias is None


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attentions_of_another_form_stay_closed(options):
    assert not can_open(attention(**options))


def quantized(model: nn.Module, x: torch.Tensor, rules=None, **config) -> nn.Module:
    rules = rules or [Rule("*", quantize=Quantize(**config) if config else MINMAX)]
    return torchopt.one_shot(model, rules, [x], example_inputs=(x[:1],), progress=False).eval()


def vision() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def test_all_layers_of_a_vision_transformer_run_as_integers(tmp_path):
    model, x = vision(), torch.randn(16, 3, 32, 32)
    final = quantized(model, x)
    result = torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (len(placement.integer), placement.float) == (10, [])
    kernels = placement.kernels
    assert (kernels["MatMulIntegerToFloat"], kernels["QLinearConv"], kernels["QGemm"]) == (8, 1, 1)
    assert kernels["Softmax"] == 2  # left float: faster so
    assert not {"QLinearSoftmax", "QLinearMatMul", "Gemm"} & set(kernels)
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert (verdict.weights_equal, verdict.weights_compared) == (True, 10)
    assert verdict.within_one_step >= 0.99  # layer norm and softmax in float: a value on the border of two integers moves
    assert verdict.max_steps < 2
    noise = (final(x) - model(x)).square().sum() / model(x).square().sum()
    assert -10 * float(noise.log10()) > 25  # dB
    assert result.size_bytes < 1.25 * sum(p.numel() for p in model.parameters())  # norms, biases, positions are float


def test_a_saved_transformer_is_loaded_as_it_was(tmp_path):
    model, x = vision(), torch.randn(4, 3, 32, 32)
    final = quantized(model, x)
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", vision()).eval()
    torch.testing.assert_close(again(x), final(x), rtol=0, atol=0)


def test_masks_and_tables_stand_on_an_opened_projection(tmp_path):
    model, x = vision(), torch.randn(4, 3, 32, 32)
    half = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1))
    rules = [
        Rule("*.self_attention", prune=half, cluster=torchopt.Cluster(n_clusters=8), quantize=MINMAX),
        Rule("*", quantize=MINMAX),
    ]
    final = quantized(model, x, rules)
    weight = final.get_parameter("encoder.layers.encoder_layer_0.self_attention.in_proj.weight")
    assert float((weight == 0).float().mean()) >= 0.5
    assert len(weight.unique()) <= 8


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_runs_as_integers(tmp_path, batch_first, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(6, 6, 32)
    final = torchopt.one_shot(model, [Rule("*", quantize=MINMAX)], [x], example_inputs=(x,), progress=False).eval()
    torchopt.export(final, (x,), tmp_path / "m.onnx", dynamic_batch=batch_first)
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (len(placement.integer), placement.float) == (8, [])
    assert placement.kernels["MatMulIntegerToFloat"] == 8  # no Gemm in float, which ORT makes of products of known shapes
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).within_one_step >= 0.999


def test_window_attention_runs_as_integers(tmp_path):
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10).eval()
    x = torch.randn(4, 3, 64, 64)
    final = quantized(model, x)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (len(placement.integer), placement.float) == (19, [])
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).top1_agreement == 1.0


def test_a_model_that_is_one_attention():
    class Alone(nn.MultiheadAttention):
        pass

    module, x = attention(batch_first=True), torch.randn(2, 5, 32)
    ready = torchopt.prepare(module, [Rule("*", quantize=Quantize(mode="dynamic"))]).eval()
    assert {type(m).__name__ for m in ready.modules()} >= {"OpenAttention", "FusedDynamicLinear"}
    with torch.no_grad():
        torch.testing.assert_close(ready(x, x, x)[0], module(x, x, x)[0], rtol=0.05, atol=0.02)
    assert not can_open(Alone(32, 4))  # its forward may do anything
