#!/usr/bin/env python
"""Export a trained checkpoint of your own: `torchopt quantize` under this script's older options.

    python scripts/export.py --model mypackage.nets:build --checkpoint best.pt --input-shape 3,224,224 --out model.onnx
    python scripts/export.py --model torchvision.models:resnet18 --checkpoint best.pt --input-shape 3,224,224 \
        --calibration pictures/ --preprocess imagenet --target ort-x86 --out model.onnx

Everything is done by the command (`torchopt quantize --help`); what is not known here is handed on to it as it is. The exit code is 0
when the file was written, 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys

from torchopt.cli.commands import status

RENAMED = {
    "--checkpoint": "--weights",
    "--calibration": "--data",
    "--out": "--out",
    "--weight-bits": "--bits",
    "--input-shape": "--input-shape",
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="MODULE:FUNCTION", help="builds the network; called without arguments")
    parser.add_argument("--checkpoint", metavar="FILE", help="a state_dict, plain or inside a trainer's checkpoint")
    parser.add_argument("--input-shape", metavar="C,H,W", help="the first input without its batch dimension; any number of sizes")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .onnx or .ort file to write")
    parser.add_argument("--calibration", metavar="DATA", help="what torchopt quantize takes as --data")
    parser.add_argument("--weight-bits", metavar="N", help="bits of the quantized weights, 2 to 8")
    parser.add_argument("--half", action="store_true", help="store weights as float16")
    parser.add_argument("--no-pack", action="store_true", help="leave the weights dense")
    parser.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        help="integers, after training, where --calibration shows the ranges; --no-quantize only checks the float file on that data",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    chosen, others = options().parse_known_args(arguments)
    if chosen.quantize and not chosen.calibration:
        return refused("--quantize: needs --calibration DIR, data that shows the range of each activation")
    if chosen.quantize and chosen.half:
        return refused("--half: contradicts --quantize; choose one")
    quantizes = chosen.quantize if chosen.quantize is not None else bool(chosen.calibration) and not chosen.half
    mode = "static" if quantizes else "float16" if chosen.half else "float"
    command = ["quantize", chosen.model, "--force", "--mode", mode, *(["--pack", "no"] if chosen.no_pack else []), *others]
    for ours, theirs in RENAMED.items():
        value = getattr(chosen, ours.removeprefix("--").replace("-", "_"))
        command += [theirs, value] if value is not None and (quantizes or ours != "--weight-bits") else []
    return status(command)


def refused(sentence: str) -> int:
    print(f"export: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
