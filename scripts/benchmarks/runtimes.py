"""What each runtime does with a packed file: does it decode the weights once, at load? Latency and load time against the dense file.

MobileNetV2 with 80 % zeros and 16 values a weight, float and int8, in ONNX Runtime (Python), onnxruntime-web (WebAssembly) in Node
and in headless Chromium, and OpenVINO. A runtime that folds the decode has the dense file's latency. What is not installed is left
out, and the table says so: onnxruntime-web is looked for in $TORCHOPT_WEB_MODULES, else in node_modules; Chromium in
$TORCHOPT_CHROMIUM, else on the path.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
from harness import DOCS, interleave, machine, note, ratio

from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule, export, one_shot, unpack
from torchopt.runtime import session

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path(os.environ.get("TORCHOPT_WEB_MODULES", ROOT / "node_modules"))
CHROMIUM = os.environ.get("TORCHOPT_CHROMIUM") or shutil.which("chromium")
FOLDED = 1.15  # latency packed / dense below which the decode does not run at each inference: it would double it
HEAD = [
    "runtime",
    "file",
    "decodes at load",
    "latency packed / dense",
    "load ms dense",
    "load ms packed",
    "load ms by unpack",
    "outputs",
]


def files(folder: Path, size: int) -> dict[str, dict[str, Path]]:
    """The network, float and int8, each as a dense and as a packed file."""
    torch.manual_seed(0)
    model, x = torchvision.models.mobilenet_v2(weights=None), torch.randn(4, 3, size, size)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one batch in training mode gives random weights activations of a trained network's size
    model(x)
    model.eval()
    shared: dict[str, Any] = {"prune": Prune(schedule=ConstantSparsity(target_sparsity=0.8)), "cluster": Cluster(n_clusters=16)}
    found = {}
    for name, extra in (("float", {}), ("int8", {"quantize": Quantize(observer="minmax")})):
        note(name)
        small = one_shot(model, [Rule("*", **shared, **extra)], [x], example_inputs=(x[:1],), progress=False)
        found[name] = {form: folder / f"{name}_{form}.onnx" for form in ("dense", "packed")}
        for form, path in found[name].items():
            export(small, (x[:1],), path, pack=form == "packed")
    return found


def row(runtime: str, name: str, latency: float, loads: dict[str, float], equal: bool) -> dict[str, Any]:
    """One line of the table."""
    return {
        "runtime": runtime,
        "file": name,
        "folds": latency < FOLDED,
        "latency_ratio": round(latency, 3),
        "load_ms": {form: round(ms, 1) for form, ms in loads.items()},
        "outputs": "equal bits" if equal else "DIFFER",
    }


def by_ort(name: str, pair: dict[str, Path], x: np.ndarray, rounds: int) -> dict[str, Any]:
    """ONNX Runtime on the CPU, one thread."""
    import onnxruntime

    opened = {form: session(path) for form, path in pair.items()}
    feed = {opened["dense"].get_inputs()[0].name: x}
    loads = interleave({form: (lambda path=path: session(path)) for form, path in pair.items()}, repeats=5)  # type: ignore[misc]
    times = interleave({form: (lambda s=s: s.run(None, feed)) for form, s in opened.items()}, repeats=rounds)  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        kinds = [_kinds(path, Path(folder) / "optimized.onnx") for path in pair.values()]
    found = _measured(
        f"ONNX Runtime {onnxruntime.__version__}", name, times, loads, [s.run(None, feed)[0] for s in opened.values()]
    )
    return found | {"same_optimized_graph": kinds[0] == kinds[1]}


def _kinds(path: Path, optimized: Path) -> list[str]:
    session(path, optimized_to=optimized)
    return sorted(node.op_type for node in onnx.load(optimized).graph.node)


def _measured(runtime: str, name: str, times: Any, loads: Any, outputs: list[np.ndarray]) -> dict[str, Any]:
    milliseconds = {form: 1e3 * statistics.median(seconds) for form, seconds in loads.items()}
    return row(runtime, name, ratio(times, "packed", "dense")[0], milliseconds, bool(np.array_equal(*outputs)))


def by_web(runtime: str, where: str, name: str, pair: dict[str, Path], x: np.ndarray, rounds: int) -> dict[str, Any]:
    """onnxruntime-web, WebAssembly, one thread: dense, packed, and packed through unpack.mjs."""
    feed = {"type": "float32", "dims": x.shape, "data": base64.b64encode(x.tobytes()).decode()}
    cases = {form: {"file": str(path), "unpack": False} for form, path in pair.items()}
    cases["unpacked"] = {"file": str(pair["packed"]), "unpack": True}
    spec = {"cases": cases, "feeds": {onnx.load(pair["dense"]).graph.input[0].name: feed}, "loads": 5, "repeats": rounds}
    command = ["node", str(ROOT / "scripts" / "web" / "run.mjs"), str(MODULES), where]
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{runtime}: {done.stderr[-1000:]}")
    answer = json.loads(done.stdout)
    loads = {form: statistics.median(np.add(got["load_ms"], got["unpack_ms"])) for form, got in answer.items()}
    latency = statistics.median(np.divide(answer["packed"]["latency_ms"], answer["dense"]["latency_ms"]))
    equal = answer["dense"]["outputs"] == answer["packed"]["outputs"] == answer["unpacked"]["outputs"]
    return row(runtime, name, float(latency), loads, equal)


def by_openvino(name: str, pair: dict[str, Path], x: np.ndarray, rounds: int) -> dict[str, Any]:
    """OpenVINO on the CPU, one thread: it refuses functions inside a model, so the packed file is unpacked first."""
    import openvino

    core, settings = openvino.Core(), {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def load(path: Path) -> Any:
        return core.compile_model(str(path), "CPU", settings)

    version = f"OpenVINO {openvino.__version__.split('-')[0]}"
    try:
        load(pair["packed"])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        unpacked = pair["packed"].with_suffix(".unpacked.onnx")
        start = time.perf_counter()
        unpack(pair["packed"], unpacked)
        load(unpacked)
        spent = 1e3 * (time.perf_counter() - start)
        opened, ours = load(pair["dense"]), session(pair["dense"])
        start = time.perf_counter()
        load(pair["dense"])
        loads = {"dense": 1e3 * (time.perf_counter() - start), "unpacked": spent}
        a, b, c = opened(x)[0], load(unpacked)(x)[0], ours.run(None, {ours.get_inputs()[0].name: x})[0]
        found = row(version, name, float("nan"), loads, bool(np.array_equal(a, b)))
        return found | {"refuses": reason, "relative_to_ort": float(np.abs(a - c).max() / np.abs(c).max())}
    both = {form: load(path) for form, path in pair.items()}
    cases: dict[str, Callable[[], object]] = {form: (lambda m=m: m(x)) for form, m in both.items()}  # type: ignore[misc]
    loads = interleave({form: (lambda path=path: load(path)) for form, path in pair.items()}, repeats=3)  # type: ignore[misc]
    return _measured(version, name, interleave(cases, repeats=rounds), loads, [m(x)[0] for m in both.values()])


def web_version() -> str:
    """Of the installed onnxruntime-web."""
    return str(json.loads((MODULES / "onnxruntime-web" / "package.json").read_text(encoding="utf-8"))["version"])


def measure(pairs: dict[str, dict[str, Path]], size: int, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines, and what is left out."""
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    web = shutil.which("node") is not None and (MODULES / "onnxruntime-web").is_dir()
    browser = web and CHROMIUM is not None and (MODULES / "playwright-core").is_dir()
    rows, missing = [by_ort(name, pair, x, rounds) for name, pair in pairs.items()], []
    for there, runtime, where in ((web, "Node", "node"), (browser, "Chromium", str(CHROMIUM))):
        if not there:
            missing.append(f"onnxruntime-web in {runtime}")
            continue
        note(runtime)
        rows += [by_web(f"onnxruntime-web {web_version()}, {runtime}", where, n, pair, x, rounds) for n, pair in pairs.items()]
    try:
        rows += [by_openvino(name, pair, x, rounds) for name, pair in pairs.items()]
    except ImportError:
        missing.append("OpenVINO")
    return rows, missing


def table(rows: list[dict[str, Any]], missing: list[str], pairs: dict[str, dict[str, Path]]) -> str:
    """The lines as a Markdown table, with what they were measured on."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    sizes = "; ".join(
        f"{n} {p['dense'].stat().st_size / 1e6:.2f} → {p['packed'].stat().st_size / 1e6:.2f} MB" for n, p in pairs.items()
    )
    lines = [f"`scripts/bench runtimes` ({where}): MobileNetV2, 80 % zeros, 16 values a weight; files {sizes}; one thread", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for r in rows:
        loads = [f"{r['load_ms'][form]:.0f}" if form in r["load_ms"] else "–" for form in ("dense", "packed", "unpacked")]
        folds, latency = ("yes" if r["folds"] else "**no**"), f"{r['latency_ratio']:.2f}"
        outputs = r["outputs"]
        if "refuses" in r:
            folds, latency = "refuses functions: `unpack` first", "–"
            outputs += f" unpacked; {r['relative_to_ort']:.1g} of the largest from ONNX Runtime's"
        lines.append("| " + " | ".join([r["runtime"], r["file"], folds, latency, *loads, outputs]) + " |")
    return "\n".join(lines) + "\n" + (f"\nNot installed here: {', '.join(missing)}.\n" if missing else "")


def main() -> int:
    """Measure, write the table, and fail where a packed file gives other outputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller pictures and fewer rounds; writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    size, rounds = (96, 5) if quick else (224, 30)
    with tempfile.TemporaryDirectory() as folder:
        pairs = files(Path(folder), size)
        rows, missing = measure(pairs, size, rounds)
        text = table(rows, missing, pairs)
    print(text)
    if not quick:
        document = {"command": "scripts/bench runtimes", "machine": machine(), "rows": rows, "missing": missing}
        (DOCS / "runtimes.json").write_text(json.dumps(document, indent=1).replace("NaN", "null") + "\n", encoding="utf-8")
        (DOCS / "runtimes.md").write_text(text, encoding="utf-8")
    return 0 if all(r["outputs"] == "equal bits" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
