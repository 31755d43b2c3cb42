"""The oldest ONNX Runtime that pyproject.toml allows runs what the default export writes, to the last bit of today's outputs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import torchopt

SCRIPT = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0])
print(onnxruntime.__version__)
"""


def oldest() -> str:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'"onnxruntime>=([\d.]+)"', text)
    return version if version.count(".") == 2 else f"{version}.0"


@pytest.mark.slow
def test_the_oldest_allowed_runtime_gives_the_same_bits(tmp_path):
    folder = tmp_path / "old"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", str(folder)]
    done = subprocess.run([*pip, f"onnxruntime=={oldest()}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {oldest()} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU6(), torch.nn.Conv2d(16, 64, 3), torch.nn.ReLU()),
        *(torch.nn.Conv2d(64, 64, 3, groups=64), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)),
    ).eval()
    x = torch.randn(8, 3, 16, 16)
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize(), cluster=torchopt.Cluster(n_clusters=16))]
    prepared = torchopt.prepare(net, rules, example_inputs=(x,))
    torchopt.calibrate(prepared, [x], progress=False)
    path = tmp_path / "m.onnx"
    assert torchopt.export(torchopt.finalize(prepared), (x,), path).packing.rows
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT4 in types  # what older runtimes have no Cast of
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == oldest()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
