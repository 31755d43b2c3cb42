"""Post-training int8 in ONNX Runtime: how many layers run as integers, and how fast, beside float and other people's quantizers.

Random weights, batch 1, one thread, interleaved in one process; ratios to the float file are medians of paired bursts. NNCF is measured
where it is installed (`pip install -e .[bench]`) and ORT runs the file that it gives; else the row says why not.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from harness import Row, note, write
from peers import by_nncf, by_ort, preprocessed
from torch import nn

import torchopt

NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "regnet_y_400mf",
    "mnasnet1_0",
    "convnext_tiny",
    "vit_b_16",
)
GOALS = {
    "mobilenet_v3_small": 0.85,
    "mobilenet_v3_large": 0.75,
    "efficientnet_b0": 0.90,
    "densenet121": 0.45,
    "shufflenet_v2_x1_0": 0.75,
}
GEOMETRIC_MEAN = 0.53


def network(name: str) -> nn.Module:
    """A torchvision network with random weights."""
    torch.manual_seed(0)
    extra = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **extra).eval()


def measure(name: str, repeats: int) -> tuple[Row, float]:
    """Quantize one network three ways, and time float, ours and the peers'."""
    note(f"quantize: {name}")
    model, x = network(name), torch.randn(4, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        floats, older, ours, ort, nncf = (Path(folder) / f"{kind}.onnx" for kind in ("float", "older", "ours", "ort", "nncf"))
        torchopt.export(model, (x[:1],), floats, pack=False)
        as_the_peer = torchopt.Quantize(observer="minmax", rounding="nearest", equalize=False)
        rule = torchopt.Rule("*", quantize=as_the_peer)
        final = torchopt.one_shot(model, [rule], [x], example_inputs=(x[:1],), progress=False)
        torchopt.export(final, (x[:1],), ours, pack=False)
        torchopt.export(model, (x[:1],), older, pack=False, opset=20)  # in 21 NNCF writes types that ORT refuses
        batches = [x[i : i + 1].numpy() for i in range(len(x))]
        by_ort(preprocessed(floats), ort, batches)
        refused = not_measured(preprocessed(older), nncf, batches)
        placement = torchopt.inspect(ours)
        timing = torchopt.benchmark([floats, ours, ort, *([] if refused else [nncf])], repeats=repeats, progress=False).rows
    peers = [row.ratio for row in timing[2:]]
    best = min(1.0, *peers) * 1.02
    goal = min(best, GOALS.get(name, best))
    said = f"NNCF {peers[1]:.2f}" if not refused else f"NNCF not measured: {refused}"
    row = Row(
        what=name,
        asked=f"≤ {goal:.2f} × float",
        reached=f"{timing[1].ratio:.2f} [{timing[1].ratio_low:.2f}–{timing[1].ratio_high:.2f}]",
        holds=timing[1].ratio <= goal,
        note=f"ORT's own {peers[0]:.2f}; {said}; {len(placement.integer)} of {len(placement.layers)} layers integer",
    )
    return row, timing[1].ratio


def not_measured(prepared: Path, target: Path, batches: list[np.ndarray]) -> str:
    """Quantize with NNCF, and say why its file cannot be timed; empty where it can."""
    try:
        by_nncf(prepared, target, batches)
    except ImportError:
        return "not installed"
    except Exception as error:  # of its own, of onnx, of numpy
        return f"it fails with {type(error).__name__}"
    try:
        torchopt.runtime.session(target)
    except torchopt.TorchoptError:
        return "ORT refuses its file"
    return ""


def main() -> None:
    """Measure, print, write docs/bench/quantize.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, few bursts")
    parser.add_argument("--networks", nargs="+", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.networks or (NETWORKS[2:4] if options.quick else NETWORKS)
    rows, ratios = [], []
    for name in names:
        try:
            row, ours = measure(name, 5 if options.quick else 20)
            ratios.append(ours)
        except torchopt.TorchoptError as error:
            row = Row(what=name, asked="≤ float", reached="–", holds=False, note=str(error)[:160])
        rows.append(row)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    rows.append(Row(what="geometric mean", asked=f"≤ {GEOMETRIC_MEAN}", reached=f"{mean:.2f}", holds=mean <= GEOMETRIC_MEAN))
    write("quantize", rows)


if __name__ == "__main__":
    main()
