#!/usr/bin/env python
"""Export a trained checkpoint of your own: quantize it where calibration data is given, write one ONNX file, and prove it equal.

    python scripts/export.py --model mypackage.nets:build --checkpoint best.pt --input-shape 3,224,224 --out model.onnx
    python scripts/export.py --model torchvision.models:resnet18 --checkpoint best.pt --input-shape 3,224,224 \
        --calibration pictures/ --target ort-x86 --out model.onnx

The file is checked twice: its weights are compared bit for bit with torch's, and its outputs on the calibration data (or on random
inputs) with those of the torch model. The exit code is 0 when the file was written, 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchopt
from torchopt.data import read_inputs
from torchopt.errors import ConfigError, FileError, ModelError
from torchopt.export import to_ort
from torchopt.io.importing import load_callable

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where trainers put the weights in their checkpoints


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="MODULE:FUNCTION", help="builds the network; called without arguments")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a state_dict saved by torch.save, plain or inside a trainer's checkpoint"
    )
    parser.add_argument(
        "--input-shape", required=True, metavar="C,H,W", help="one input without its batch dimension; any number of sizes"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the ONNX file to write; the list of operators goes beside a .ort file"
    )
    parser.add_argument("--target", default="ort-x86", help="ort-x86, ort-x86-avx2, ort-arm, ort-web or openvino")
    parser.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        help="integers, after training, where --calibration shows the ranges; --no-quantize only checks the float file on that data",
    )
    parser.add_argument("--weight-bits", type=int, default=8, metavar="N", help="bits of the quantized weights, 2 to 8")
    parser.add_argument("--calibration", metavar="DIR", help="a folder of pictures, or a .npy file of inputs (N, C, H, W)")
    parser.add_argument("--samples", type=int, default=200, help="inputs to calibrate and to check with")
    parser.add_argument("--half", action="store_true", help="store weights as float16")
    parser.add_argument("--no-pack", action="store_true", help="leave the weights dense")
    parser.add_argument("--static-batch", action="store_true", help="fix the batch size at 1")
    parser.add_argument("--opset", type=int, help="17 to 23; the target's own by default")
    return parser


def main(arguments: list[str] | None = None) -> int:
    chosen = options().parse_args(arguments)
    try:
        return run(chosen)
    except torchopt.TorchoptError as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(chosen: argparse.Namespace) -> int:
    shape = sizes(chosen.input_shape)
    if chosen.quantize and not chosen.calibration:
        raise ConfigError("--quantize: needs --calibration DIR, data that shows the range of each activation")
    if chosen.quantize and chosen.half:
        raise ConfigError("--half: contradicts --quantize; choose one")
    quantizes = chosen.quantize if chosen.quantize is not None else bool(chosen.calibration) and not chosen.half
    model = built(chosen.model, chosen.checkpoint)
    inputs = read_inputs(chosen.calibration, size=shape, samples=chosen.samples) if chosen.calibration else torch.randn(8, *shape)
    example = (inputs[:1],)
    if quantizes:
        rules = [torchopt.Rule("*", quantize=torchopt.Quantize(weight_bits=chosen.weight_bits))]
        model = torchopt.one_shot(model, rules, inputs.split(32), example_inputs=example, target=chosen.target)
    elif chosen.half:
        model = model.half().float()  # the rounding is done here; export finds that half the bytes hold every weight
    result = written(model, example, chosen)
    print(result)
    batches = inputs.split(1 if chosen.static_batch else 32)
    if Path(chosen.out).suffix != ".ort":
        print(torchopt.verify(model, chosen.out, batches))
        print(torchopt.inspect(chosen.out))
    return 0


def written(model: nn.Module, example: tuple[torch.Tensor, ...], chosen: argparse.Namespace) -> object:
    """Write the ONNX file, or through one a file in ORT format."""
    keywords: dict[str, Any] = {
        "target": chosen.target,
        "dynamic_batch": not chosen.static_batch,
        "pack": False if chosen.no_pack else "auto",
        "opset": chosen.opset,
    }
    out = Path(chosen.out)
    if out.suffix != ".ort":
        return torchopt.export(model, example, out, **keywords)
    between = out.with_suffix(".onnx")
    torchopt.export(model, example, between, **keywords)
    return to_ort(between, out)


def sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--input-shape: got {text!r}; sizes such as 3,224,224 are needed")
    return tuple(int(part) for part in parts)


def built(spec: str, checkpoint: str | None) -> nn.Module:
    model = load_callable(spec, where="--model")()
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model: {spec} returned {type(model).__name__}; an nn.Module is needed")
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, path: str) -> None:
    """Load a plain state_dict, one inside a trainer's checkpoint, or one of DataParallel."""
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file; give a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise classes of their own
        raise FileError(f"{path}: cannot be read as a state_dict: {str(error).splitlines()[0][:200]}") from error
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FileError(f"{path}: holds no state_dict; save model.state_dict() with torch.save")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"{path}: does not fit {type(model).__name__}: {reason}; give the model that it was saved from"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
