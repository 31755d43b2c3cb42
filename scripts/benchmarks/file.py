"""Bytes of whole files: packed and smallest against gzip, zstd, xz and DeepCABAC of the same dense file, and what the bytes are.

Seven networks in four forms. Those of MLPerf Tiny and the transformer are trained here for some steps on random pictures of random
classes, so that weights are bells as after training and not the uniform noise of initialization; MobileNetV2 has its weights of ImageNet,
from the data folder. Weights are rounded to nearest: what the solver does to accuracy is another benchmark. `zstd` is the
module zstandard or the program; DeepCABAC is `nncodec` where it can be installed, applied to the integers of each weight, with what
gzip makes of the rest of the file.

    scripts/bench file --only resnet8,digits     measures these and keeps the other figures of the last run
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from harness import DOCS, Row, note, write
from ptq import network
from torch import nn

from torchopt import Cluster, Prune, Quantize, Rule, export, one_shot
from torchopt.models import build
from torchopt.pack import pack
from torchopt.report.file_bytes import file_bytes

EVERY = {"include_depthwise": True}
PLAIN = {"observer": "minmax", "rounding": "nearest", "equalize": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain int8": {"quantize": Quantize(**PLAIN)},
    "4 bits": {"quantize": Quantize(weight_bits=4, **PLAIN)},
    "16 values": {"cluster": Cluster(n_clusters=16, **EVERY), "quantize": Quantize(**PLAIN)},
    "80 % zeros + 16 values + int8": {
        "prune": Prune(schedule=0.8, **EVERY), "cluster": Cluster(n_clusters=16, **EVERY), "quantize": Quantize(**PLAIN),
    },
}  # fmt: skip
LOADS = 5  # of each file, of which the least counts


class Transformer(nn.Module):
    """Two encoder layers of width 128 over 32 tokens of 64 features; ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 32, 64) → (N, 10)."""
        return self.out(self.encoder(self.into(x)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # network, shape of an input, classes
    "digits": (lambda: build("digits_net", 10), (1, 8, 8), 10),
    "resnet8": (lambda: build("resnet8", 10, 3), (3, 32, 32), 10),
    "ds_cnn": (lambda: build("ds_cnn", 12), (1, 49, 10), 12),
    "mobile_net_025": (lambda: build("mobile_net", 2, 3, width=0.25), (3, 96, 96), 2),
    "transformer": (Transformer, (32, 64), 10),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 10),
    "mobilenet_v2": (network, (3, 128, 128), 1000),
}


def trained(name: str, steps: int) -> tuple[nn.Module, torch.Tensor]:
    """The network after some steps, and inputs for calibration."""
    make, shape, classes = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(32, *shape)
    y = torch.randint(0, classes, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4 if name == "resnet18" else 2e-3, weight_decay=0.05)
    for _ in range(0 if name == "mobilenet_v2" else steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x


def coded(dense: Path) -> dict[str, int | None]:
    """Bytes that general compressors make of a file, None of one that is not here."""
    raw = dense.read_bytes()
    found: dict[str, int | None] = {"gzip -9": len(gzip.compress(raw, 9)), "xz -9": len(lzma.compress(raw, preset=9))}
    found["zstd -19"] = None
    if importlib.util.find_spec("zstandard") is not None:
        import zstandard

        found["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(raw))
    elif (program := shutil.which("zstd")) is not None:
        found["zstd -19"] = len(subprocess.run([program, "-19", "-c", str(dense)], check=True, capture_output=True).stdout)
    found["DeepCABAC and the graph"] = deepcabac(dense)
    return found


def deepcabac(dense: Path) -> int | None:
    """Bytes of nncodec's stream of the weights' integers, lossless, and of gzip's of the file without them; None without nncodec."""
    if importlib.util.find_spec("nncodec") is None:
        return None
    import nncodec.nn
    import onnx
    from onnx import numpy_helper

    model, weights = onnx.load(dense), {}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            weights[tensor.name] = numpy_helper.to_array(tensor).astype("int32")
            tensor.raw_data = b""
    stream = nncodec.nn.encode(weights, {"lossless": True, "qp": 0})
    return len(stream) + len(gzip.compress(model.SerializeToString(), 9))


def load_ms(paths: dict[str, Path]) -> dict[str, float]:
    """The least time of opening each file, in turn."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(LOADS):
        for name, path in paths.items():
            start = time.perf_counter()
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(found) for name, found in times.items()}


def measured(name: str, model: nn.Module, x: torch.Tensor, setting: str, folder: Path) -> dict[str, Any]:
    """One cell: all sizes, and what the bytes of the packed files are."""
    note(f"file: {name}, {setting}")
    small = one_shot(model, [Rule("*", **SETTINGS[setting])], [x], example_inputs=(x[:1],), progress=False)
    paths = {kind: folder / f"{kind}.onnx" for kind in ("dense", "packed", "smallest")}
    export(small, (x[:1],), paths["dense"], pack=False)
    pack(paths["dense"], paths["packed"])
    report = pack(paths["dense"], paths["smallest"], smallest=True)
    weights = sum(row.dense_bytes for row in report.rows)
    return {
        "weights": weights,
        "entropy": sum(row.entropy_bytes for row in report.rows),
        "codes": report.packed_bytes,
        "sizes": {kind: path.stat().st_size for kind, path in paths.items()},
        "coded": coded(paths["dense"]),
        "load_ms": load_ms(paths),
        "bytes": {kind: file_bytes(paths[kind]) for kind in ("packed", "smallest")},
    }


def rows_of(cells: dict[str, dict[str, Any]]) -> list[Row]:
    """A row a cell, and the medians that were asked for."""
    rows, ratios = [], []
    for cell, found in cells.items():
        sizes, codings = found["sizes"], found["coded"]
        ratio = sizes["packed"] / codings["gzip -9"]
        ratios.append(ratio)
        others = ", ".join(f"{kind} {'not here' if size is None else format(size, ',')}" for kind, size in codings.items())
        loads = ", ".join(f"{kind} {ms:.0f}" for kind, ms in found["load_ms"].items())
        parts = ", ".join(f"{part} {size:,}" for part, size in found["bytes"]["packed"].items() if size)
        rows.append(
            Row(
                what=cell,
                asked="packed ≤ gzip -9",
                reached=f"{sizes['packed']:,} packed, {sizes['smallest']:,} smallest of {sizes['dense']:,}",
                holds=ratio <= 1,
                note=f"{ratio:.3f} × gzip; {others}; load ms: {loads}; packed is {parts}",
            )
        )
    median = statistics.median(ratios)
    rows.append(Row(what="packed / gzip -9, median", asked="≤ 0.97", reached=f"{median:.3f}", holds=median <= 0.97))
    smallest = statistics.median(f["sizes"]["smallest"] / f["coded"]["gzip -9"] for f in cells.values())
    rows.append(Row(what="smallest / gzip -9, median", asked="–", reached=f"{smallest:.3f}"))
    large = [f["codes"] / f["entropy"] for f in cells.values() if f["entropy"] and f["weights"] >= 65_536]
    if large:
        rows.append(
            Row(
                what="smallest: codes and tables / entropy, worst from 64 k weights on",
                asked="≤ 1.04",
                reached=f"{max(large):.3f}",
                holds=max(large) <= 1.04,
                note="where Huffman codes pay; else those of default packing",
            )
        )
    return rows


def main() -> int:
    """Measure, and write docs/bench/file.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="networks, by comma; the last run's figures of the others are kept")
    parser.add_argument("--quick", action="store_true", help="the four small networks, few steps")
    chosen = parser.parse_args()
    names = chosen.only.split(",") if chosen.only else list(NETWORKS)[: 4 if chosen.quick else None]
    warnings.simplefilter("ignore")
    known = DOCS / "file.json"
    cells: dict[str, dict[str, Any]] = {}
    if chosen.only and known.exists():
        cells = json.loads(known.read_text(encoding="utf-8"))["details"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model, x = trained(name, 5 if chosen.quick else 40)
            for setting in SETTINGS:
                cells[f"{name}, {setting}"] = measured(name, model, x, setting, Path(folder))
            write("file", rows_of(cells), details=cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
