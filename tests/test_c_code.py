"""C code gives ONNX Runtime's integers at every step, on this machine under the sanitizers and on Cortex-M4 in QEMU."""

import re
import shutil

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import torchopt
from torchopt.c_code import export_c, verify_c
from torchopt.c_code.machines import MACHINES
from torchopt.cli.commands import status
from torchopt.errors import ConfigError, DataError, FileError, ModelError, TargetError

compiles = pytest.mark.skipif(bool(MACHINES["host"].missing), reason=MACHINES["host"].missing or "compiles")
emulates = pytest.mark.skipif(bool(MACHINES["cortex-m4"].missing), reason=MACHINES["cortex-m4"].missing or "runs")


def block(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool, self.less, self.more = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * nn.functional.hardsigmoid(self.more(torch.relu(self.less(self.pool(x)))))


class Branches(nn.Module):
    """Groups, a channel shuffle, halves, a concatenation, pools, a residual sum, softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped, self.wide = block(3, 8), block(8, 8, groups=2), block(8, 8, 5)
        self.most, self.less, self.mean = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.last = nn.Linear(24 * 3 * 3, 5)

    def forward(self, x):
        x = self.less(self.first(x))
        n, c, h, w = x.shape
        y = self.grouped(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = torch.cat([y + x, self.wide(x), self.most(x)], 1)
        return torch.softmax(self.last(self.mean(x).flatten(1)), -1)


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(10, 16), nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x, y):
        z = torch.relu(self.a(x)) + torch.relu(self.b(y))
        return self.c(z), torch.sigmoid(self.d(z))


def gated():
    hard = nn.Hardswish
    return nn.Sequential(
        block(3, 8, 3, 2, act=hard),
        block(8, 8, 5, groups=8, act=hard),
        Gate(8),
        block(8, 16, 1),
        nn.Flatten(),
        nn.Linear(1024, 4),
    )


def signal():
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, 2, 2), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8), nn.LeakyReLU(0.1),
        nn.Conv1d(8, 12, 3), nn.SiLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def padded():
    return nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 6, 3, 2), nn.ReLU6(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(),
        nn.Linear(96, 7), nn.GELU(), nn.Linear(7, 2), nn.LogSoftmax(-1),
    )  # fmt: skip


NETWORKS = {
    "gated": (gated, [(3, 16, 16)]),
    "branches": (Branches, [(3, 12, 12)]),
    "signal": (signal, [(2, 50)]),
    "two": (Two, [(10,), (6,)]),
    "padded": (padded, [(3, 16, 16)]),
}


def made(name, samples=16, quantized=True):
    torch.manual_seed(0)
    build, shapes = NETWORKS[name]
    inputs = tuple(torch.randn(samples, *shape) for shape in shapes)
    batch = inputs if len(inputs) > 1 else inputs[0]
    model, example = build().eval(), tuple(x[:1] for x in inputs)
    if quantized:
        model = torchopt.one_shot(model, [torchopt.Rule("*", quantize=torchopt.Quantize())], [batch], example_inputs=example)
    return model, example, batch


@compiles
@pytest.mark.parametrize("name", ["gated", "branches"])
def test_every_step_has_the_runtimes_integers(name, tmp_path):
    model, example, batch = made(name)
    written = torchopt.export(model, example, tmp_path / "net.c")
    verdict = torchopt.verify_c(model, written.path, [batch], machines=["host"])
    assert verdict.equal, str(verdict)
    (host,) = verdict.machines
    assert (host.samples, host.integers_different, host.first_difference) == (16, 0, None)
    assert host.integers > 16 * 1000
    assert host.max_abs < 1e-5


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_in_integers_and_in_float(name, quantized, tmp_path):
    model, example, batch = made(name, quantized=quantized)
    torchopt.export(model, example, tmp_path / "net.c")
    assert verify_c(model, tmp_path / "net.c", [batch]).equal


@emulates
def test_a_cortex_m4_gives_the_same_integers(tmp_path):
    model, example, batch = made("two")
    written = torchopt.export(model, example, tmp_path / "net.c")
    (board,) = verify_c(model, tmp_path / "net.c", [batch], machines=["cortex-m4"], board_samples=3).machines
    assert (board.samples, board.integers_different, board.first_difference) == (3, 0, None)
    assert written.flash_bytes < board.flash_bytes < written.flash_bytes + 4096
    assert board.ram_bytes == written.ram_bytes == 40
    assert 1_000 < board.instructions < 20_000
    assert sum(count for _, count in board.instructions_by_layer) == board.instructions


@compiles
def test_a_changed_file_is_found_out_and_another_networks_is_refused(tmp_path):
    model, example, batch = made("two")
    source = torchopt.export(model, example, tmp_path / "net.c").path
    text = source.read_text()
    source.write_text(re.sub(r"(bias\[16\] = \{\n\s+)(-?\d+)", r"\g<1>9999", text, count=1))
    (host,) = verify_c(model, source, [batch], machines=["host"]).machines
    assert host.integers_different > 0
    assert host.first_difference.split()[1] == "QGemm"
    other, _, _ = made("two", quantized=False)
    with pytest.raises(FileError, match="written from another network"):
        verify_c(other, source, [batch])
    source.with_suffix(".h").unlink()
    with pytest.raises(FileError, match=r"net\.h: there is no such file"):
        verify_c(model, source, [batch])


@compiles
def test_strict_compilers_take_it_and_a_packed_file_gives_the_same_text(tmp_path):
    model, example, batch = made("two")
    torchopt.export(model, example, tmp_path / "dense.onnx", pack=False, target="ort-arm")
    torchopt.pack(tmp_path / "dense.onnx", tmp_path / "packed.onnx")
    for name in ("dense", "packed"):
        (tmp_path / name).mkdir()
        export_c(tmp_path / f"{name}.onnx", (), tmp_path / name / "net.c")
    assert (tmp_path / "dense" / "net.c").read_bytes() == (tmp_path / "packed" / "net.c").read_bytes()
    feed = {"x": batch[0].numpy(), "y": batch[1].numpy()}
    assert verify_c(tmp_path / "packed.onnx", tmp_path / "packed" / "net.c", [feed], machines=["host-fast"]).equal
    with pytest.raises(DataError, match=r"has the inputs x, y; a batch gives x"):
        verify_c(tmp_path / "packed.onnx", tmp_path / "packed" / "net.c", [{"x": batch[0].numpy()}])
    with pytest.raises(DataError, match=r"has shape \(16, 6\)"):
        verify_c(tmp_path / "packed.onnx", tmp_path / "packed" / "net.c", [{"x": batch[1].numpy(), "y": batch[1].numpy()}])


def onnx_file(path, nodes, inputs, outputs, constants=()):
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [oh.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in dict(constants).items()],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_what_has_no_form_in_c_is_named_with_its_layer(tmp_path):
    node = oh.make_node("CumSum", ["x", "axis"], ["summed"])
    file = onnx_file(tmp_path / "m.onnx", [node], {"x": [1, 4]}, {"summed": [1, 4]}, {"axis": np.array(1)})
    with pytest.raises(ModelError, match=r"m\.onnx: the layer 'summed': CumSum has no form in C"):
        export_c(file, (), tmp_path / "net.c")
    product = oh.make_node("MatMul", ["x", "y"], ["scores"])
    file = onnx_file(tmp_path / "m.onnx", [product], {"x": [1, 4, 4], "y": [1, 4, 4]}, {"scores": [1, 4, 4]})
    with pytest.raises(ModelError, match=r"'scores': MatMul multiplies two values that the network computes, as attention does"):
        export_c(file, (), tmp_path / "net.c")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_free_sizes_names_and_limits_are_one_sentence_and_leave_nothing(tmp_path):
    node = oh.make_node("Relu", ["x"], ["y"])
    file = onnx_file(tmp_path / "m.onnx", [node], {"x": ["n", 3, "height", 8]}, {"y": ["n", 3, "height", 8]})
    with pytest.raises(ModelError, match=r"size 2 of the input 'x' is free \('height'\), and C code has fixed sizes"):
        export_c(file, (), tmp_path / "net.c")
    model = nn.Linear(64, 64)
    for name in ("my-net.c", "3d.c", "int.c"):
        with pytest.raises(ConfigError, match="is no C identifier"):
            torchopt.export(model, (torch.zeros(1, 64),), tmp_path / name)
    with pytest.raises(
        TargetError, match=r"flash: the network takes [\d,]+ bytes, [\d,]+ more than the 10,000 given; .*Gemm .* \(16,640\)"
    ):
        torchopt.export(model, (torch.zeros(1, 64),), tmp_path / "net.c", flash=10_000)
    deep = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(TargetError, match=r"ram: the network takes 256 bytes, 56 more than the 200 given"):
        torchopt.export(deep, (torch.zeros(1, 64),), tmp_path / "net.c", ram=200)
    with pytest.raises(ConfigError, match="limits of C code"):
        torchopt.export(model, (torch.zeros(1, 64),), tmp_path / "net.onnx", ram=200)
    with pytest.raises(ConfigError, match=r"machine 'cortex-m5' is unknown; .*did you mean 'cortex-m7' or 'cortex-m4'"):
        verify_c(model, tmp_path / "net.c", [], machines=["cortex-m5"])
    with pytest.raises(FileError, match="the folder .* does not exist"):
        torchopt.export(model, (torch.zeros(1, 64),), tmp_path / "none" / "net.c")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_absent_tools_are_a_clear_word(tmp_path, monkeypatch):
    model, example, batch = made("two", quantized=False)
    source = torchopt.export(model, example, tmp_path / "net.c").path
    monkeypatch.setattr(shutil, "which", lambda name: None)
    verdict = verify_c(model, source, [batch])
    assert not verdict.equal
    assert [m.machine for m in verdict.machines] == ["host", "cortex-m4", "cortex-m7"]
    assert str(verdict.machines[1]).startswith("cortex-m4: skipped: arm-none-eabi-gcc is not installed; Debian's packages")


@compiles
def test_the_command_line_writes_and_proves(tmp_path, capsys):
    torchopt.export(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), (torch.zeros(1, 8),), tmp_path / "m.onnx")
    assert status(["export", str(tmp_path / "m.onnx"), "--out", str(tmp_path / "net.c"), "--ram", "1k"]) == 0
    assert "net.c and net.h: " in capsys.readouterr().out
    command = ["verify-c", str(tmp_path / "m.onnx"), str(tmp_path / "net.c"), "--samples", "3", "--machine", "host-fast"]
    assert status(command) == 0
    assert "host-fast: 0 of 0 integers equal" in capsys.readouterr().out
    assert status(["export", str(tmp_path / "m.onnx"), "--out", str(tmp_path / "net.c"), "--ram", "many"]) == 2
    assert "--ram: got 'many'; a number of bytes is needed" in capsys.readouterr().err
