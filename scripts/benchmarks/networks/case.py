"""One stranger's network with its data: exported, run by torch and from the file, and beside ONNX Runtime's own quantizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import note
from onnxruntime import quantization as ort_quantization
from torch import nn

import torchopt
from networks.stranger import Inputs, Stranger
from torchopt import Rule
from torchopt.network.proof import flat

SLACK = 1.0  # dB below the peer that still counts as its equal
UNKNOWN = 10.0  # dB that are asked where the peer fails
Arrays = list[np.ndarray]


class Feeds(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Batches for ORT's quantizer, by input name."""

    def __init__(self, names: list[str], batches: list[Inputs]) -> None:
        self.left = [{name: x.numpy() for name, x in zip(names, batch)} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


def tensors(outputs: object) -> list[torch.Tensor]:
    """Every tensor of whatever a network returns, in order."""
    return [value for value in flat(outputs) if isinstance(value, torch.Tensor)]


@torch.no_grad()
def by_torch(model: nn.Module, batches: list[Inputs]) -> Arrays:
    """Each output over all batches, end to end."""
    rows = [[t.float().numpy() for t in tensors(model(*batch))] for batch in batches]
    return [np.concatenate([r.reshape(-1) for r in column]) for column in zip(*rows)]


def by_file(path: Path, batches: list[Inputs]) -> Arrays:
    """The same of a file."""
    runner = torchopt.runtime.session(path)
    names = [i.name for i in runner.get_inputs()]
    rows = [runner.run(None, {n: x.numpy() for n, x in zip(names, batch)}) for batch in batches]
    return [np.concatenate([np.asarray(r, np.float32).reshape(-1) for r in column]) for column in zip(*rows)]


def decibels(found: Arrays, reference: Arrays) -> float:
    """Signal to noise of the worst output, at most 99."""
    worst = 99.0
    for a, b in zip(found, reference, strict=True):
        noise, signal = float(np.square(a - b).mean()), float(b.var())
        if not np.isfinite(noise):
            return -99.0
        worst = min(worst, 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else 99.0)
    return worst


class Case:
    """One network with its data, and the folder for its files."""

    def __init__(self, stranger: Stranger, folder: Path) -> None:
        self.stranger, self.folder = stranger, folder
        self.model = stranger.model()
        self.calibration, self.others = stranger.batches(8, 4, 1), stranger.batches(8, 4, 2)
        self.example = stranger.batches(1, 1, 3)[0]
        self.reference = by_torch(self.model, self.others)

    def export(self, model: nn.Module, name: str) -> Path:
        """Write a file that is not packed: packing is proved elsewhere, and the numbers are the same."""
        path = self.folder / f"{name}.onnx"
        torchopt.export(model, self.example, path, dynamic_batch=self.stranger.batched, pack=False)
        return path

    @functools.cached_property
    def peer(self) -> float | None:
        """The decibels of ORT's own quantizer, or None where it fails."""
        return self.peer_of(self.model, "float")

    def peer_of(
        self, model: nn.Module, name: str, reference: Arrays | None = None, batches: list[Inputs] | None = None
    ) -> float | None:
        """The same of another network's file, against that network's outputs, calibrated on other batches where there are some."""
        path = self.export(model, name)
        prepared, target = path.with_suffix(".prepared.onnx"), path.with_suffix(".ort.onnx")
        try:
            ort_quantization.shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            names = [i.name for i in torchopt.runtime.session(path).get_inputs()]
            ort_quantization.quantize_static(
                *(str(prepared), str(target), Feeds(names, self.calibration if batches is None else batches)),
                quant_format=ort_quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=ort_quantization.QuantType.QUInt8,
                weight_type=ort_quantization.QuantType.QInt8,
            )
            return decibels(by_file(target, self.others), self.reference if reference is None else reference)
        except Exception as error:
            note(f"{self.stranger.name}: ORT's quantizer: {error}"[:200])
            return None

    def one_shot(self, rule: Rule, model: nn.Module | None = None) -> nn.Module:
        """Compress without training, the network itself or what an earlier round made of it."""
        model = self.model if model is None else model
        return torchopt.one_shot(model, [rule], self.calibration, example_inputs=self.example, progress=False).eval()

    def compared(self, model: nn.Module, name: str, reference: Arrays, peer: float | None) -> dict[str, Any]:
        """Export, run, and judge: the decibels against `reference` beside those that the peer has."""
        path = self.export(model, name)
        file, here = decibels(by_file(path, self.others), reference), decibels(by_torch(model, self.others), reference)
        goal = UNKNOWN if peer is None else min(peer - SLACK, 60.0)
        cell = {"dB": file, "torch_dB": here, "peer_dB": peer}
        if file < here - 3 and file < 60:
            return cell | {"verdict": "file differs", "why": f"file {file:.1f} dB, torch {here:.1f} dB"}
        if file < goal:
            return cell | {
                "verdict": "below the peer",
                "why": f"{file:.1f} dB, ORT {'fails' if peer is None else f'{peer:.1f} dB'}",
            }
        return cell | {"verdict": "works"}
