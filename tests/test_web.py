"""onnxruntime-web in Node and in headless Chromium: packed files run with equal outputs, and `unpack.mjs` gives the dense file's bits.

The packages onnxruntime-web and playwright-core are looked for in $TORCHOPT_WEB_MODULES, else in node_modules beside the checkout's
files; Chromium in $TORCHOPT_CHROMIUM, else on the path.
"""

import base64
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import torchopt
from torchopt.pack.pack import decode_initializers, pack
from torchopt.web import UNPACK

ROOT = Path(__file__).resolve().parents[1]
MODULES = Path(os.environ.get("TORCHOPT_WEB_MODULES", ROOT / "node_modules"))
CHROMIUM = os.environ.get("TORCHOPT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KINDS = {  # sparsity, values
    "table4": (0.0, 16),
    "table7": (0.0, 100),
    "table8": (0.0, 200),
    "table3": (0.0, 8),
    "table5": (0.0, 30),
    "table6": (0.0, 60),
    "mask+table3": (0.5, 8),
    "mask+table4, all codes taken": (0.5, 17),
    "gaps4+table4": (0.9, 16),
    "gaps6+one": (0.97, 2),
    "mask+raw": (0.6, 10_000),
}


def opset_18(path: Path) -> None:
    """Give the file an operator set without UINT4, in which four-bit parts lie otherwise."""
    model = onnx.load(path)
    model.opset_import[0].version = 18
    onnx.save(model, path)


@pytest.fixture(params=["node", "chromium"])
def runtime(request):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (MODULES / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: npm install onnxruntime-web playwright-core, or set TORCHOPT_WEB_MODULES")
    if request.param == "node":
        return "node"
    if CHROMIUM is None or not (MODULES / "playwright-core").is_dir():
        pytest.skip("Chromium or playwright-core is not installed: set TORCHOPT_CHROMIUM and TORCHOPT_WEB_MODULES")
    return CHROMIUM


def ort_web(runtime: str, cases: dict, feeds: dict, **options) -> dict:
    """Run files by onnxruntime-web; `cases` maps a name to (path, unpack first?)."""
    spec = {
        "cases": {name: {"file": str(path), "unpack": unpacked} for name, (path, unpacked) in cases.items()},
        "feeds": {
            name: {"type": str(x.dtype), "dims": list(x.shape), "data": base64.b64encode(x.tobytes()).decode()}
            for name, x in feeds.items()
        },
        **options,
    }
    command = ["node", ROOT / "scripts" / "web" / "run.mjs", MODULES, runtime]
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def output(answer: dict, name: str) -> np.ndarray:
    first = next(iter(answer[name]["outputs"].values()))
    return np.frombuffer(base64.b64decode(first["data"]), np.float32).reshape(first["dims"])


def drawn(sparsity: float, values: int, dtype, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pool = rng.permutation(np.r_[-128:0, 1:128])[: values - 1] if dtype == np.int8 else rng.standard_normal(values)
    w = rng.choice(pool, size=(96, 96)).astype(dtype)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def constants() -> dict[str, np.ndarray]:
    """One weight of each codec: float and int8, a table a channel, a constant, float16."""
    found = {f"float {k}": drawn(*v, np.float32, i) for i, (k, v) in enumerate(KINDS.items())}
    found |= {f"int8 {k}": drawn(*v, np.int8, i) for i, (k, v) in enumerate(KINDS.items()) if v[1] <= 255}
    found["half"] = drawn(0.5, 16, np.float16, 1)
    found["double"] = drawn(0.9, 16, np.float64, 4)
    rng = np.random.default_rng(2)
    found["channels"] = (rng.integers(0, 4, (96, 96)) + rng.random((96, 1))).astype(np.float32)
    found["groups"] = (rng.integers(0, 4, (96, 96)) + rng.random((12, 1)).repeat(8, axis=0)).astype(np.float32)
    found["sparse channels"] = found["groups"] * (rng.random((96, 96)) < 0.4)
    found["bell"] = np.round(rng.standard_t(2, (96, 96)) * 3).clip(-128, 127).astype(np.int8)
    found["constant"] = np.full((96, 96), 0.25, np.float32)
    found["näme"] = drawn(0.9, 8, np.float32, 3)
    return found


def write_chain(path: Path, weights: dict[str, np.ndarray]) -> None:
    """The sum of x times each weight."""
    nodes, terms = [], []
    for i, (name, w) in enumerate(weights.items()):
        used = name
        if w.dtype != np.float32:
            nodes.append(helper.make_node("Cast", [name], [f"c{i}"], to=TensorProto.FLOAT))
            used = f"c{i}"
        nodes.append(helper.make_node("MatMul", ["x", used], [f"y{i}"]))
        terms.append(f"y{i}")
    nodes.append(helper.make_node("Sum", terms, ["y"]))
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 96])] for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[0], ends[1], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def unpack_in_node(path: Path, to: Path) -> subprocess.CompletedProcess:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    program = (
        f"import {{unpack, isPacked}} from {json.dumps(UNPACK.as_uri())}; import fs from 'node:fs';"
        "const bytes = fs.readFileSync(process.argv[1]); fs.writeFileSync(process.argv[2], unpack(bytes));"
        "console.log(isPacked(bytes), isPacked(fs.readFileSync(process.argv[2])));"
    )
    command = ["node", "--input-type=module", "-e", program, path, to]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("most", "codec"), [(0, "gaps6+one"), (1 << 18, "gaps4+one")])
def test_P7_gaps_before_one_value_alone_in_a_file(tmp_path, monkeypatch, most, codec):
    """The best gaps, and gaps of four bits, which small tensors have by default; beside others they share a stream."""
    monkeypatch.setattr(sys.modules["torchopt.codecs.encode"], "PAIRED_AT_MOST", most)
    weight = constants()["int8 gaps6+one"]
    write_chain(tmp_path / "a.onnx", {"w": weight})
    assert [row.codec for row in pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows] == [codec]
    done = unpack_in_node(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert (done.returncode, done.stdout) == (0, "true false\n"), done.stderr
    (stored,) = onnx.load(tmp_path / "c.onnx").graph.initializer
    assert numpy_helper.to_array(stored).tobytes() == weight.tobytes()


@pytest.mark.parametrize("opset", [18, 21])
def test_P7_unpack_in_javascript_gives_the_dense_bits_of_every_codec(tmp_path, opset):
    weights = constants()
    write_chain(tmp_path / "a.onnx", weights)
    if opset == 18:
        opset_18(tmp_path / "a.onnx")
    codecs = {row.codec for row in pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows}
    codecs |= {c.removeprefix("together ") for c in codecs}  # codes of one form may share a stream
    assert {"table4", "channel2", "one", "mask+raw", "table7", "mask+channel3"} <= codecs, codecs
    assert any(c.startswith("gaps") for c in codecs)
    assert any(c.startswith("together") for c in codecs), "codes of several weights in one stream"
    if opset == 21:
        assert any(c.startswith("table") and "+" in c for c in codecs), "codes with rare high bits apart"
    done = unpack_in_node(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert (done.returncode, done.stdout) == (0, "true false\n"), done.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "c.onnx"))
    model = onnx.load(tmp_path / "c.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    by_python = decode_initializers(tmp_path / "b.onnx")
    assert set(stored) == set(weights) == set(by_python)
    for name, w in weights.items():
        assert (stored[name].dtype, stored[name].shape) == (w.dtype, w.shape)
        assert stored[name].tobytes() == w.tobytes(), name
    assert not model.functions
    assert [o.domain for o in model.opset_import] == [""]
    assert list(model.graph.node) == list(onnx.load(tmp_path / "a.onnx").graph.node)


def test_a_dense_file_comes_back_as_it_is(tmp_path):
    write_chain(tmp_path / "a.onnx", {"w": np.eye(96, dtype=np.float32)})
    assert unpack_in_node(tmp_path / "a.onnx", tmp_path / "b.onnx").stdout == "false false\n"
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_damaged_files_raise_an_error_that_says_where(tmp_path):
    write_chain(tmp_path / "a.onnx", {"w": drawn(0.9, 16, np.float32, 0)})
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    whole = (tmp_path / "b.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    assert "unpack: is no whole ONNX file" in unpack_in_node(tmp_path / "cut.onnx", tmp_path / "c.onnx").stderr
    model = onnx.load_model_from_string(whole)
    call = next(node for node in model.graph.node if node.domain == "torchopt")
    next(a for a in call.attribute if a.name == "d").ints[:] = [1 << 40]
    onnx.save(model, tmp_path / "huge.onnx")
    message = r"unpack: the packed weight w is damaged \(the gaps span 92\d\d elements, the tensor has 1099511627776\)"
    assert re.search(message, unpack_in_node(tmp_path / "huge.onnx", tmp_path / "c.onnx").stderr)
    assert not (tmp_path / "c.onnx").exists()


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A convolutional network with shared weights, dense and packed for the web."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                step = p.abs().max() / 7
                p.copy_((p / step).round() * step)
    folder = tmp_path_factory.mktemp("network")
    x = (torch.randn(1, 3, 32, 32),)
    packed = torchopt.export(model, x, folder / "packed.onnx", target="ort-web")
    torchopt.export(model, x, folder / "dense.onnx", target="ort-web", pack=False)
    assert packed.size_bytes < 0.3 * packed.dense_size_bytes
    return folder


def test_P7_outputs_are_equal_and_decoding_happens_at_load(network, runtime):
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    cases = {"dense": (network / "dense.onnx", False), "packed": (network / "packed.onnx", False)}
    cases["unpacked"] = (network / "packed.onnx", True)
    answer = ort_web(runtime, cases, {name: x for name in _inputs(network / "dense.onnx")}, repeats=30)
    dense = output(answer, "dense")
    np.testing.assert_array_equal(output(answer, "packed"), dense)
    np.testing.assert_array_equal(output(answer, "unpacked"), dense)
    opened = onnxruntime.InferenceSession(str(network / "packed.onnx"), providers=["CPUExecutionProvider"])
    here = opened.run(None, {opened.get_inputs()[0].name: x})[0]
    np.testing.assert_allclose(dense, here, rtol=1e-4, atol=1e-5)
    ratio = np.median(np.array(answer["packed"]["latency_ms"]) / np.array(answer["dense"]["latency_ms"]))
    assert ratio < 1.5, f"decoded at each inference: {ratio:.2f} times the dense file's latency"


def test_P7_unpack_inside_the_runtime_gives_the_dense_bits(tmp_path, runtime):
    weights = {name: w for name, w in constants().items() if w.dtype != np.float16}
    write_chain(tmp_path / "a.onnx", weights)
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    x = np.random.default_rng(0).standard_normal((2, 96)).astype(np.float32)
    cases = {
        "dense": (tmp_path / "a.onnx", False),
        "packed": (tmp_path / "b.onnx", False),
        "unpacked": (tmp_path / "b.onnx", True),
    }
    answer = ort_web(runtime, cases, {"x": x}, keep=True)
    model = onnx.load_model_from_string(base64.b64decode(answer["unpacked"]["bytes"]))
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    assert {name: w.tobytes() for name, w in stored.items()} == {name: w.tobytes() for name, w in weights.items()}
    np.testing.assert_array_equal(output(answer, "unpacked"), output(answer, "dense"))
    np.testing.assert_array_equal(output(answer, "packed"), output(answer, "dense"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def test_the_example_page_of_the_docs_runs(network, tmp_path):
    if CHROMIUM is None or not (MODULES / "onnxruntime-web").is_dir():
        pytest.skip("Chromium or onnxruntime-web is not installed: set TORCHOPT_CHROMIUM and TORCHOPT_WEB_MODULES")
    text = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    (tmp_path / "index.html").write_text(text.split("```html\n", 1)[1].split("```", 1)[0], encoding="utf-8")
    (tmp_path / "unpack.mjs").write_bytes(UNPACK.read_bytes())
    (tmp_path / "model.onnx").write_bytes((network / "packed.onnx").read_bytes())
    (tmp_path / "ort").symlink_to(MODULES.resolve() / "onnxruntime-web" / "dist")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=60000", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        server.shutdown()
    opened = onnxruntime.InferenceSession(str(network / "packed.onnx"), providers=["CPUExecutionProvider"])
    scores = opened.run(None, {opened.get_inputs()[0].name: np.full((1, 3, 32, 32), 0.5, np.float32)})[0]
    assert f'<p id="result">class {scores.argmax()}</p>' in done.stdout, done.stdout[-500:] + done.stderr[-500:]


def _inputs(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path).graph.input]
