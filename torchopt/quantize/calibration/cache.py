"""Calibration caches: the activation ranges of a calibrated model as JSON, from which a second quantization needs no data.

    {"torchopt_ranges": 1, "layers": ["<quantized layer>", …], "ranges": {"<quantizer>": {"low": −1.5, "high": 3.0, "grid": [0, 255]}, …}}

A range holds as long as the weights do. Corrections that learn from data (equalization, rounding other than to nearest, bias correction)
change the weights with it, which ranges alone do not repeat; such a model is saved whole, by `torchopt.save`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchopt.errors import FileError, StateError
from torchopt.io.files import write_text
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.modules import Fused

KEY, VERSION = "torchopt_ranges", 1


def save_ranges(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the range of every activation of a calibrated model to a JSON file, float32 values exactly.

    Args:
        model: what `prepare` returned, after `calibrate` or training.
        path: the file; it is written atomically.

    Raises:
        StateError: the model observes no activation, has not seen data, or was corrected by data.
        FileError: the file cannot be written.

    Example:
        >>> import tempfile, torchopt
        >>> rules = [torchopt.Rule("*", quantize=torchopt.Quantize(equalize=False, rounding="nearest"))]
        >>> net, x = nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(8, 4)
        >>> first = torchopt.calibrate(torchopt.prepare(net, rules, (x,)), [x], progress=False)
        >>> path = Path(tempfile.mkdtemp()) / "ranges.json"
        >>> torchopt.save_ranges(first, path)
        >>> second = torchopt.prepare(net, rules, (x,))
        >>> torchopt.load_ranges(second, path)
        >>> torch.equal(torchopt.finalize(second)(x), torchopt.finalize(first)(x))
        True
    """
    quantizers = _quantizers(model, "save_ranges")
    for name, quantizer in quantizers.items():
        if not quantizer.calibrated:
            raise StateError(f"save_ranges: {name} has not seen any data; call torchopt.calibrate(model, batches) first")
    ranges = {
        name: {"low": float(q.min_val), "high": float(q.max_val), "grid": [q.quant_min, q.quant_max]}
        for name, q in quantizers.items()
    }
    write_text(path, json.dumps({KEY: VERSION, "layers": _layers(model), "ranges": ranges}, indent=1) + "\n")


def load_ranges(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Set the range of every activation of a prepared model from a file of `save_ranges`, in place; the model is then calibrated.

    Args:
        model: what `prepare` returned, for the same network and the same rules.
        path: the file.

    Raises:
        StateError: the model observes no activation, is to be corrected by data, or is another one than was saved.
        FileError: the file is missing, or no such file; the model is as before.

    Example:
        >>> load_ranges(nn.Linear(2, 2), "ranges.json")
        Traceback (most recent call last):
        torchopt.errors.StateError: load_ranges: nothing in this model observes data; quantize with mode='static' in prepare
    """
    quantizers = _quantizers(model, "load_ranges")
    layers, ranges = _read(path)
    if layers != _layers(model) or set(ranges) != set(quantizers):
        raise StateError(
            f"load_ranges: the model has {len(_layers(model))} quantized layers and {len(quantizers)} ranges, {path} has others "
            f"({len(layers)} and {len(ranges)}); the network and the rules of the file are needed"
        )
    for name, quantizer in quantizers.items():
        if ranges[name][2] != [quantizer.quant_min, quantizer.quant_max]:
            grid = f"{quantizer.quant_min}…{quantizer.quant_max}"
            raise StateError(
                f"load_ranges: {name} has the grid {grid}, the file {ranges[name][2]}; the same activation_bits are needed"
            )
    for name, quantizer in quantizers.items():
        low, high, _ = ranges[name]
        quantizer.set_range(torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32))


def _quantizers(model: nn.Module, verb: str) -> dict[str, ActivationQuantizer]:
    """What observes data, by name; where corrections change the weights too, an error."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer) and not m.fixed}
    if not found:
        raise StateError(f"{verb}: nothing in this model observes data; quantize with mode='static' in prepare")
    for name, layer in model.named_modules():
        config = layer.config if isinstance(layer, Fused) else None
        if config is not None and (config.equalize or config.corrects_bias or config.rounding != "nearest"):
            raise StateError(
                f"{verb}: calibration corrects the weights of {name} too, which ranges do not repeat; keep the whole model with "
                "torchopt.save, or use Quantize(equalize=False, rounding='nearest', bias_correction=False)"
            )
    return found


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def _read(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, tuple[float, float, list[int]]]]:
    """Read and check a file: the layers, and (low, high, grid) by name."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}); a file of save_ranges is needed") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: is no JSON; a file of save_ranges is needed") from error
    if not isinstance(content, dict) or content.get(KEY) != VERSION or not isinstance(content.get("ranges"), dict):
        raise FileError(f"{path}: holds no activation ranges of version {VERSION}; a file of save_ranges is needed")
    if not isinstance(content.get("layers"), list):
        raise FileError(f"{path}: names no layers; a file of save_ranges is needed")
    return content["layers"], {name: _entry(path, name, entry) for name, entry in content["ranges"].items()}


def _entry(path: str | os.PathLike[str], name: str, entry: Any) -> tuple[float, float, list[int]]:
    low, high, grid = (entry.get(k) if isinstance(entry, dict) else None for k in ("low", "high", "grid"))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
    if not (numbers and low <= high and isinstance(grid, list)):  # type: ignore[operator]
        raise FileError(f"{path}: {name} is {json.dumps(entry)[:60]}; finite low ≤ high and a grid are needed")
    return float(low), float(high), grid  # type: ignore[arg-type]
