"""`torchopt quantize`: a trained network and data in, one quantized file out, and what it cost, in one command.

What is not said is the library's default (`Quantize`, `one_shot`, `export`): there is no second set of defaults here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchopt.cli.onnx_commands import as_json
from torchopt.cli.terminal import plain, show
from torchopt.errors import ConfigError, FileError
from torchopt.io.files import check_place

if TYPE_CHECKING:
    from torch import nn

    from torchopt.data.samples import Given
    from torchopt.quantize import Quantize
    from torchopt.runtime.inputs import InputShape

SHAPE = "NAME:SIZES[:DTYPE]"
RANDOM = 16  # samples that a file is compared on where no data is given
DATA = "A folder, .tar or .zip of pictures; .npy, .npz, .pt or .parquet; or module:function that yields batches."
PREPROCESS = "imagenet, pixels (only / 255), weights:NAME (torchvision), timm, a processor's folder, or module:function."


@click.command()
@click.argument("model")
@click.option("-d", "--data", metavar="SOURCE", help=DATA)
@click.option("-o", "--out", default="model.onnx", show_default=True, metavar="FILE", help="The .onnx or .ort file to write.")
@click.option("-f", "--force", "--overwrite", is_flag=True, help="Write over the file.")
@click.option("-i", "--input", "inputs", multiple=True, metavar=SHAPE, help="An input with its batch: x:1,3,224,224; repeatable.")
@click.option("--input-shape", metavar="C,H,W", hidden=True, help="The first input without its batch.")
@click.option("-w", "--weights", metavar="FILE", help="A state_dict or checkpoint (.pt, .pth, .safetensors) to load first.")
@click.option("--preprocess", metavar="WHAT", help=PREPROCESS)
@click.option("--resize", metavar="PIXELS", help="Of pictures: the short side, or HEIGHT,WIDTH.")
@click.option("--crop", metavar="PIXELS", help="Of pictures: the middle SIZE, or HEIGHT,WIDTH.")
@click.option("--mean", metavar="A,B,C", help="Subtracted from pixels in [0, 1].")
@click.option("--std", metavar="A,B,C", help="What these are then divided by.")
@click.option("-n", "--samples", default=256, show_default=True, type=click.IntRange(1), help="Read; half of them calibrate.")
@click.option(
    "-m", "--mode", type=click.Choice(["static", "dynamic", "weight_only", "float16", "float"]), help="What is rounded."
)
@click.option("-b", "--bits", type=click.IntRange(2, 8), help="Bits of the weights.")
@click.option("--activation-bits", type=int, metavar="N", help="8 or 16.")
@click.option("--observer", help="How activation ranges are chosen.")
@click.option("--rounding", help="How weights are rounded.")
@click.option("--evaluate", metavar="MODULE:FUNCTION", help="Your score of a network: function(model) returns a number.")
@click.option("--max-drop", type=float, metavar="X", help="How much worse that may become, in its own units.")
@click.option("--lower-is-better", is_flag=True, help="The score is a loss or an error.")
@click.option("--target", default="ort-x86", show_default=True, help="The runtime aimed at.")
@click.option("--pack", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True, help="Write packed weights.")
@click.option("--opset", type=int, metavar="N", help="17 to 23; the target's own by default.")
@click.option("--static-batch", is_flag=True, help="Fix the batch size at 1.")
@as_json
def quantize(
    model: str,
    data: str | None,
    out: str,
    force: bool,
    inputs: Sequence[str],
    input_shape: str | None,
    weights: str | None,
    samples: int,
    evaluate: str | None,
    max_drop: float | None,
    lower_is_better: bool,
    target: str,
    pack: str,
    opset: int | None,
    static_batch: bool,
    as_json: bool,
    **said: Any,
) -> None:
    """Quantize MODEL (module:function) without training: calibrate on half of the data, export, compare on the other half."""
    _check_place(out, data, weights, force=force)
    asked = _asked(inputs, input_shape)
    from torchopt.io.importing import in_users_code, load_callable
    from torchopt.models import ImportedModel
    from torchopt.run.once import quantize_once

    recipe = _recipe(said)
    if max_drop is not None and evaluate is None:
        raise ConfigError("--max-drop: is in the units of --evaluate module:function, which is not given")
    if max_drop is not None and not max_drop >= 0:
        raise ConfigError(f"--max-drop: got {max_drop}; 0 or more is needed")
    network = ImportedModel(import_=model, weights=weights).build().eval()
    score = None if evaluate is None else load_callable(evaluate, where="--evaluate")
    given = _given(network, data, asked, samples, said, recipe)
    with in_users_code("quantize"):
        outcome = quantize_once(
            network,
            recipe,
            given,
            Path(out),
            target=target,
            evaluate=score,
            name=evaluate or "",
            max_drop=max_drop,
            lower=lower_is_better,
            pack={"auto": "auto", "yes": True, "no": False}[pack],
            opset=opset,
            dynamic_batch=not static_batch,
        )
    parts = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    found = {name: part if part is None or isinstance(part, str) else plain(part) for name, part in parts.items()}
    show(found, str(outcome), as_json)


def _check_place(out: str, data: str | None, weights: str | None, *, force: bool) -> None:
    """Refuse an empty name, one of a file that is read, one that cannot be written, and one that is there."""
    if not out.strip():
        raise ConfigError("--out: is empty; the name of what to write is needed")
    place = Path(out)
    for given in (data, weights):
        if given is not None and place.exists() and Path(given).exists() and place.samefile(given):
            raise ConfigError(f"--out: {out} is what is read; the name of another file is needed")
    if place.suffix not in (".onnx", ".ort"):
        raise ConfigError(f"--out: got {out!r}; a name that ends in .onnx or .ort is needed")
    if place.exists() and not force:
        raise FileError(f"{out}: is there already; --out FILE names another, --force writes over it")
    check_place(out)


def _asked(inputs: Sequence[str], shape: str | None) -> dict[str, InputShape]:
    """The inputs by name; "" stands for the first, of the older spelling."""
    from torchopt.runtime.inputs import InputShape, parse_inputs

    if shape is None:
        return parse_inputs(inputs)
    parts = shape.split(",")
    if inputs or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"--input-shape: got {shape!r}; the sizes of one input are needed, such as --input x:1,3,224,224")
    return {"": InputShape(shape=(1, *map(int, parts)))}


def _recipe(said: dict[str, Any]) -> Quantize | None:
    """What the options say of rounding; the library's default where they say nothing."""
    from torchopt.quantize import Quantize

    fields = {
        "mode": "mode",
        "bits": "weight_bits",
        "activation_bits": "activation_bits",
        "observer": "observer",
        "rounding": "rounding",
    }
    given = {field: said[option] for option, field in fields.items() if said[option] is not None}
    if given.get("mode") != "float":
        return Quantize(**given)
    if len(given) > 1:
        raise ConfigError("--mode float: rounds nothing; leave --bits, --activation-bits, --observer and --rounding out")
    return None


def _given(
    network: nn.Module,
    data: str | None,
    asked: dict[str, InputShape],
    samples: int,
    said: dict[str, Any],
    recipe: Quantize | None,
) -> Given:
    """The data, or random samples where none is needed."""
    from torchopt.data.given import random_batches, read_batches, takes
    from torchopt.data.preprocess import asked as preprocessing

    first = next(iter(takes(network)), "x")
    asked = {name or first: shape for name, shape in asked.items()}
    preprocess = preprocessing(
        network, preset=said["preprocess"], mean=said["mean"], std=said["std"], resize=said["resize"], crop=said["crop"]
    )
    if data is not None:
        return read_batches(data, network, samples=samples, inputs=asked, preprocess=preprocess)
    if recipe is not None and recipe.mode == "static":
        raise ConfigError(f"--data: is needed, to see the range of each activation; or --mode dynamic or weight_only. {DATA}")
    if not asked:
        raise ConfigError(f"--input: {SHAPE} is needed where no --data is given")
    return random_batches(network, asked, RANDOM)
