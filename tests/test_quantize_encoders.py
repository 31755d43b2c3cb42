"""Hugging Face encoders, whose forward no tracer follows: dynamic and weight-only, tied decoders included."""

import pytest
import torch

import torchopt
from torchopt.network.grid import grids
from torchopt.network.weights import weights
from torchopt.pack.pack import decode_initializers

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's and transformers' own

MODES = {
    "dynamic": {"mode": "dynamic"},
    "weight_only": {"mode": "weight_only"},
    "blocks": {"mode": "weight_only", "weight_bits": 4, "block_size": 32},
}
# of the largest output: a float sum that falls on the other side of a rounding moves one input by a step; 8-bit inputs in blocks
TOLERANCE = {"dynamic": 0.01, "weight_only": 1e-5, "blocks": 0.05}


def encoder(name):
    """A random one of two layers; no download."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return getattr(transformers, name)(transformers.BertConfig(**sizes, max_position_embeddings=32)).eval()


def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 10:] = 0  # padding
    return {"input_ids": torch.randint(0, 500, (4, 16), generator=generator), "attention_mask": mask}


def small(net, **config):
    return torchopt.one_shot(net, [torchopt.Rule("*", quantize=torchopt.Quantize(**config))]).eval()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("BertModel", "dynamic"),
        ("BertForSequenceClassification", "weight_only"),
        ("BertForMaskedLM", "dynamic"),
        ("BertForMaskedLM", "blocks"),
    ],
)
def test_encoders_are_quantized_exported_and_proven(name, mode, tmp_path):
    net, inputs = encoder(name), batch()
    final = small(net, **MODES[mode])
    result = torchopt.export(final, tuple(inputs.values()), tmp_path / "m.onnx", fast_blocks=mode == "blocks")
    float_bytes = 4 * sum(p.numel() for p in net.parameters())
    assert result.size_bytes < (0.32 if mode != "blocks" else 0.25) * float_bytes
    placement = torchopt.inspect(tmp_path / "m.onnx")
    linear = sum(isinstance(m, torch.nn.Linear) for m in net.modules())
    assert len(placement.integer) == (0 if mode == "weight_only" else linear)
    assert placement.kernels.get("DequantizeLinear", 0) == 0  # nothing is decoded at each inference
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [inputs], progress=False)
    assert verdict.weights_equal
    assert verdict.weights_compared == len(weights(final))
    assert verdict.max_relative < TOLERANCE[mode]
    with torch.no_grad():
        ours, theirs = final(**inputs)[0], net(**inputs)[0]
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < (0.3 if mode == "blocks" else 0.03)


def test_a_tied_decoder_stays_tied(tmp_path):
    net = encoder("BertForMaskedLM")
    final = small(net, mode="dynamic")
    table, decoder = final.bert.embeddings.word_embeddings, final.cls.predictions.decoder
    assert table.weight is decoder.weight
    grids(final)["cls.predictions.decoder.weight"].codes(decoder.weight)
    torchopt.export(final, tuple(batch().values()), tmp_path / "m.onnx")
    stored = decode_initializers(tmp_path / "m.onnx")
    assert sum(v.shape == (500, 64) for v in stored.values()) == 1


def test_training_a_dynamic_encoder_lowers_its_loss():
    net, inputs = encoder("BertForSequenceClassification").train(), batch()
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize(mode="dynamic", weight_bits=4))])
    optimizer = torch.optim.Adam(ready.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = ready(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        optimizer.step()
        torchopt.step(ready)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    final = torchopt.finalize(ready).eval()
    with torch.no_grad():
        torch.testing.assert_close(final(**inputs).logits, ready.eval()(**inputs).logits, rtol=0, atol=0)


def test_static_mode_runs_every_layer_as_integers(tmp_path):
    net, inputs = encoder("BertModel"), batch()
    rule = torchopt.Rule("*", quantize=torchopt.Quantize(observer="minmax", rounding="nearest", equalize=False))
    ready = torchopt.prepare(net, [rule], tuple(inputs.values())).eval()
    torchopt.calibrate(ready, [inputs], progress=False)
    final = torchopt.finalize(ready).eval()
    with torch.no_grad():
        torch.testing.assert_close(final(**inputs)[0], ready(**inputs)[0], rtol=0, atol=0)
        assert float((final(**inputs)[0] - net(**inputs)[0]).square().mean()) < 1e-3
    torchopt.export(final, tuple(inputs.values()), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    linear = sum(isinstance(m, torch.nn.Linear) for m in net.modules())
    assert len(placement.integer) == linear
    assert placement.kernels["QuantizeLinear"] <= linear - 4  # query, key and value read one rounded tensor
    assert torchopt.verify(final, tmp_path / "m.onnx", [inputs], progress=False).weights_equal
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", encoder("BertModel")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], final(**inputs)[0], rtol=0, atol=0)
