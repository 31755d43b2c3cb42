"""Post-training int8 in ONNX Runtime: how many layers run as integers, and how fast, beside ORT's own quantizer and float.

Random weights, batch 1, one thread, interleaved in one process; ratios to the float file are medians of paired bursts.
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
from onnxruntime import quantization as ort_quantization
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


class Batches(ort_quantization.CalibrationDataReader):
    """Calibration data for ORT's quantizer."""

    def __init__(self, name: str, batches: list[np.ndarray]) -> None:
        self.name, self.left = name, list(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None at the end."""
        return {self.name: self.left.pop(0)} if self.left else None


def peer(source: Path, target: Path, batches: list[np.ndarray], name: str) -> None:
    """ORT's own quantizer at its best on x86: pre-processed, QDQ, uint8 activations, int8 weights per channel."""
    prepared = source.with_name("prepared.onnx")
    ort_quantization.shape_inference.quant_pre_process(str(source), str(prepared))
    ort_quantization.quantize_static(
        str(prepared),
        str(target),
        Batches(name, batches),
        quant_format=ort_quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
    )


def network(name: str) -> nn.Module:
    """A torchvision network with random weights."""
    torch.manual_seed(0)
    extra = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **extra).eval()


def measure(name: str, repeats: int) -> tuple[Row, float]:
    """Quantize one network both ways, and time float, ours and ORT's."""
    note(f"quantize: {name}")
    model, x = network(name), torch.randn(4, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{kind}.onnx" for kind in ("float", "ours", "ort")]
        torchopt.export(model, (x[:1],), files[0], pack=False)
        as_the_peer = torchopt.Quantize(observer="minmax", rounding="nearest", equalize=False)
        rule = torchopt.Rule("*", quantize=as_the_peer)
        final = torchopt.one_shot(model, [rule], [x], example_inputs=(x[:1],), progress=False)
        torchopt.export(final, (x[:1],), files[1], pack=False)
        entry = torchopt.runtime.session(files[0]).get_inputs()[0].name
        peer(files[0], files[2], [x[i : i + 1].numpy() for i in range(len(x))], entry)
        placement = torchopt.inspect(files[1])
        timing = torchopt.benchmark(files, repeats=repeats, progress=False).rows
    ours, ort = timing[1].ratio, timing[2].ratio
    best = min(1.0, ort) * 1.02
    goal = min(best, GOALS.get(name, best))
    row = Row(
        what=name,
        asked=f"≤ {goal:.2f} × float",
        reached=f"{ours:.2f} [{timing[1].ratio_low:.2f}–{timing[1].ratio_high:.2f}]",
        holds=ours <= goal,
        note=f"ORT's own {ort:.2f}; {len(placement.integer)} of {len(placement.layers)} layers integer",
    )
    return row, ours


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
