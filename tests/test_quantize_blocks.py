"""4-bit weights with a scale a block: accuracy, bits, kernels, and what is refused."""

import itertools
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser
from torch import nn

import torchopt
from torchopt.export.passes import BlockWeightsPass, IntegerWeightsPass
from torchopt.export.passes.weights.block_weights import two_a_byte
from torchopt.network.grid import Grid, grids
from torchopt.pack.decoded import halves, weight_values
from torchopt.quantize.layers.blocks import FusedBlockLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def heavy_tailed(*sizes, bias=True):
    """Linear layers with a few large weights, as transformers have; ReLU between them."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layer = nn.Linear(inputs, outputs, bias=bias)
        layer.weight.data = torch.distributions.StudentT(3.0).sample((outputs, inputs)) * 0.03
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rules(**config):
    return [torchopt.Rule("*", quantize=torchopt.Quantize(mode="weight_only", weight_bits=4, **config))]


def optimized(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_each_block_has_its_own_scale():
    """Blocks from 1/16 to 1 and from 7/16 to 7: 1/7 and 1, where a scale a channel would be 1."""
    layer = nn.Linear(32, 1, bias=False)
    ramp = torch.arange(1.0, 17.0)[None] / 16
    layer.weight.data = torch.cat([ramp, 7 * ramp], 1)
    final = torchopt.one_shot(layer, rules(block_size=16))
    grid = grids(final)["weight"]
    assert (grid.bits, grid.axis, grid.block) == (4, 0, 16)
    np.testing.assert_allclose(grid.scale.numpy(), [[np.float16(1 / 7), 1.0]], rtol=0)
    assert grid.codes(final.weight).tolist() == [[round(7 * i / 16) for i in range(1, 17)] * 2]


def test_scales_are_float16_numbers_where_those_are_normal():
    final = torchopt.one_shot(heavy_tailed(64, 32), rules(block_size=32))
    scale = grids(final)["0.weight"].scale
    torch.testing.assert_close(scale, scale.half().float(), rtol=0, atol=0)
    tiny = nn.Linear(32, 1)
    tiny.weight.data.fill_(1e-6)
    final = torchopt.one_shot(tiny, rules(block_size=32))
    np.testing.assert_allclose(final.weight.detach().numpy(), np.full((1, 32), 1e-6), rtol=1e-5)


def test_blocks_are_more_accurate_than_channels_and_small_blocks_than_large_ones():
    net, x = heavy_tailed(512, 512, 64), torch.randn(32, 512)
    errors = [relative_error(torchopt.one_shot(net, rules(block_size=b))(x), net(x)) for b in (16, 32, 128)]
    channel = relative_error(torchopt.one_shot(net, rules())(x), net(x))
    assert errors[0] < errors[1] < errors[2] < channel
    assert errors[1] < 0.6 * channel


@pytest.mark.parametrize("opset", [21, 17])
def test_products_run_on_the_four_bit_kernel(tmp_path, opset):
    net, x = heavy_tailed(128, 96, 160, 32), torch.randn(8, 128)
    final = torchopt.one_shot(net, rules(block_size=32)).eval()
    torchopt.export(final, (x,), tmp_path / "m.onnx", opset=opset, fast_blocks=True)
    _, ops = optimized(tmp_path / "m.onnx", tmp_path)
    assert ops == {"MatMulNBits": 3, "Relu": 2}  # biases inside
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (placement.integer, placement.float) == (["0.weight", "2.weight", "4.weight"], [])
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert (verdict.weights_equal, verdict.weights_compared) == (True, 3)
    assert verdict.max_relative < 0.02  # the kernel rounds its input to 8 bits
    graph = onnx.load(tmp_path / "m.onnx")
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # float arithmetic
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(exact, final(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_sequences_and_layers_without_bias(tmp_path):
    net, x = heavy_tailed(64, 64, 64, bias=False), torch.randn(2, 5, 64)
    net[2].bias = nn.Parameter(torch.randn(64))
    final = torchopt.one_shot(net, rules(block_size=16)).eval()
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    assert optimized(tmp_path / "m.onnx", tmp_path)[1] == {"MatMulNBits": 2, "Relu": 1}
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.weights_equal
    assert verdict.max_relative < 0.02


def test_the_file_takes_four_and_a_half_bits_a_weight(tmp_path):
    net = heavy_tailed(512, 512, 512, bias=False)
    final = torchopt.one_shot(net, rules(block_size=32))
    result = torchopt.export(final, (torch.randn(2, 512),), tmp_path / "m.onnx")
    assert result.size_bytes <= 1.01 * 2 * 512 * 512 * 4.5 / 8
    rows = {row.name: row for row in torchopt.report(tmp_path / "m.onnx").rows}
    assert rows["0.weight"].shape == (512, 512)
    assert rows["0.weight"].distinct_values == 15
    assert "int4" in rows["0.weight"].techniques


def test_layers_that_have_no_whole_blocks_get_a_scale_a_channel_and_are_reported(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 32), nn.Linear(32, 4))
    ready = torchopt.prepare(net, rules(block_size=32))
    assert {s.name: s.reason for s in ready.torchopt_state.skipped} == {
        "0": "only linear layers have block_size=32; it has one scale a channel",
        "2": "its 72 inputs are no multiple of block_size=32; it has one scale a channel",
    }
    final, x = torchopt.finalize(ready).eval(), torch.randn(2, 1, 8, 8)
    assert [grid.block for grid in grids(final).values()] == [None, None, 32]
    torchopt.export(final, (x,), tmp_path / "m.onnx", fast_blocks=True)
    assert torchopt.inspect(tmp_path / "m.onnx").integer == ["3.weight"]
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).weights_equal


def test_training_and_saving_keep_the_blocks(tmp_path):
    net, x = heavy_tailed(64, 64, 8), torch.randn(16, 64)
    ready = torchopt.prepare(net, rules(block_size=32))
    assert isinstance(ready[0], FusedBlockLinear)
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ready(x).square().mean()
        loss.backward()
        optimizer.step()
        torchopt.step(ready)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    final = torchopt.finalize(ready)
    torch.testing.assert_close(final(x), ready.eval()(x), rtol=0, atol=0)
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", heavy_tailed(64, 64, 8))
    assert [grid.block for grid in grids(again).values()] == [32, 32]
    torchopt.export(again, (x,), tmp_path / "m.onnx", fast_blocks=True)
    assert torchopt.inspect(tmp_path / "m.onnx").integer == ["0.weight", "2.weight"]


def test_zeros_and_shared_values_stay(tmp_path):
    net, x = heavy_tailed(64, 64, 64), torch.randn(4, 64)
    prune = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1))
    quantize = torchopt.Quantize(mode="weight_only", weight_bits=4, block_size=32)
    final = torchopt.one_shot(net, [torchopt.Rule("*", prune=prune, cluster=torchopt.Cluster(n_clusters=6), quantize=quantize)])
    for layer in (final[0], final[2]):
        assert float((layer.weight == 0).float().mean()) >= 0.5
        assert layer.weight.unique().numel() <= 6
    torchopt.export(final, (x,), tmp_path / "m.onnx", fast_blocks=True)
    assert torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False).weights_equal


def test_two_a_byte_and_back():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 64)).astype(np.int8)
    stored = two_a_byte(codes, 32)
    assert (stored.shape, stored.dtype) == ((3, 2, 16), np.uint8)
    np.testing.assert_array_equal(halves(stored), codes, strict=True)


def test_a_weight_that_something_else_reads_too_is_multiplied_at_load():
    text = (
        '<ir_version: 10, opset_import: ["": 21]>\n'
        "g(float[N, 32] x) => (float[N, 2] y) { h = Gemm<transB=1>(x, w) e = Gemm<transB=1, alpha=0.5>(x, w) y = Add(h, e) }"
    )
    scale = np.array([[0.5, 0.25], [1.0, 2.0]], np.float32)
    codes = np.random.default_rng(0).integers(-7, 8, (2, 32)).astype(np.float32)
    value = codes * scale.repeat(16, axis=1)
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(value, "w"))
    model = ir.from_proto(proto)
    known = {"w": Grid(name="w", scale=torch.from_numpy(scale), bits=4, axis=0, block=16)}
    assert not BlockWeightsPass(known)(model).modified
    assert IntegerWeightsPass(known)(model).modified
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), codes.astype(np.int8), strict=True)
    np.testing.assert_array_equal(weight_values(model)["w"], value, strict=True)
    data = ir.to_proto(model).SerializeToString()
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    y = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, 1.5 * x @ value.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_size": 32}, r"block_size: 32 with mode='static', weight_bits=8; a scale a block is for 4-bit weights"),
        ({"block_size": 32, "mode": "weight_only"}, r"weight_bits=8; a scale a block .*weight_bits=4"),
        ({"block_size": 24, "mode": "weight_only", "weight_bits": 4}, r"block_size: got 24; a power of two of at least 16"),
        ({"block_size": 32, "mode": "weight_only", "weight_bits": 4, "per_channel": False}, r"leave per_channel and learn_scale"),
        ({"block_size": 32, "mode": "weight_only", "weight_bits": 4, "learn_scale": True}, r"leave per_channel and learn_scale"),
    ],
)
def test_blocks_that_nothing_runs_are_refused(config, message):
    with pytest.raises(torchopt.ConfigError, match=message):
        torchopt.Quantize(**config)
