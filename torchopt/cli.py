"""The command line: each command reads its arguments, calls the library once, and prints the result.

Exit code 0: done. 2: a user's mistake, one line on stderr. 1: a defect, with its traceback. What a command prints as a table it
prints as JSON with `--json`. Imports that take long stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchopt.errors import ConfigError, TorchoptError

if TYPE_CHECKING:
    from torch import nn

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
targets = click.option("--target", default="ort-x86", show_default=True, help="The runtime aimed at.")
input_shape = click.option("--input-shape", required=True, metavar="C,H,W", help="Shape of one input, without the batch.")
run_inputs = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:SIZES[:DTYPE]",
    help="What a file runs on: x:1,3,320,320; once for each input.",
)
weights_file = click.option("--weights", metavar="FILE", help="A state_dict (.pt, .pth, .safetensors) to load first.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="torchopt-toolkit", prog_name="torchopt")
def app() -> None:
    """Prune, cluster and quantize PyTorch models; export one small ONNX file that ONNX Runtime runs fast."""


@app.command()
@click.argument("recipe")
@click.option("--out", required=True, metavar="DIR", help="Folder for the models and the report.")
@click.option("--resume", is_flag=True, help="Go on with the run that lies in DIR.")
@click.option("--overwrite", is_flag=True, help="Remove the run that lies in DIR and start again.")
@settings
@as_json
def run(recipe: str, out: str, resume: bool, overwrite: bool, settings: Sequence[str], as_json: bool) -> None:
    """Carry out RECIPE: train, compress, export, check, time, report."""
    from torchopt.recipe import load
    from torchopt.report import summary_table
    from torchopt.run import run

    if resume and overwrite:
        raise ConfigError("--resume: cannot be used with --overwrite; give one of the two")
    report = run(load(recipe, settings), out, resume=resume, overwrite=overwrite)
    if report:  # empty on the ranks that do not write
        show(report, summary_table(report), as_json)


@app.command()
@click.argument("recipe")
@settings
@as_json
def check(recipe: str, settings: Sequence[str], as_json: bool) -> None:
    """Read RECIPE and say which rule each weight gets; touches no data."""
    from torchopt.recipe import load
    from torchopt.run import matched

    rows = matched(load(recipe, settings).recipe)
    show(rows, table(rows), as_json)


@app.command()
@click.argument("source")
@click.option("--out", required=True, metavar="FILE", help="The ONNX file to write.")
@click.option("--input-shape", metavar="C,H,W", help="Shape of one input; needed for module:function.")
@weights_file
@targets
@click.option("--pack", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True, help="Write packed weights.")
@click.option("--static-batch", is_flag=True, help="Fix the batch size at 1.")
@as_json
def export(
    source: str, out: str, input_shape: str | None, weights: str | None, target: str, pack: str, static_batch: bool, as_json: bool
) -> None:
    """Write an ONNX file from SOURCE: the folder of a finished run, or module:function."""
    from torchopt.export import export

    model, example = _finished(source) if ":" not in source else _built(source, weights, _needed_shape(input_shape))
    packing = {"auto": "auto", "yes": True, "no": False}[pack]
    result = export(model, (example,), out, target=target, dynamic_batch=not static_batch, pack=packing)  # type: ignore[arg-type]
    show(plain(result), str(result), as_json)


@app.command()
@click.argument("source")
@click.argument("destination")
@click.option("--strip", is_flag=True, help="Leave out torch's exporter's notes on nodes (source lines, module names).")
@as_json
def pack(source: str, destination: str, strip: bool, as_json: bool) -> None:
    """Write the weights of any ONNX file in their smallest exact form."""
    from torchopt.export import pack

    result = pack(source, destination, strip=strip)
    show(plain(result), str(result), as_json)


@app.command()
@click.argument("source")
@click.argument("destination")
def unpack(source: str, destination: str) -> None:
    """Write a packed ONNX file's weights densely again, bit for bit."""
    from torchopt.export import unpack

    unpack(source, destination)
    click.echo(f"{destination}: {Path(destination).stat().st_size:,} bytes")


@app.command()
@click.argument("model")
@as_json
def inspect(model: str, as_json: bool) -> None:
    """Say which layers of an ONNX file run as integers in ONNX Runtime, which fell back, and why."""
    from torchopt.runtime import inspect

    result = inspect(model)
    show(plain(result), str(result), as_json)


@app.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of ONNX Runtime.")
@click.option("--repeats", default=30, show_default=True, type=click.IntRange(3), help="Interleaved rounds.")
@run_inputs
@as_json
def bench(models: Sequence[str], threads: int, repeats: int, inputs: Sequence[str], as_json: bool) -> None:
    """Time ONNX files against the first, interleaved."""
    from torchopt.runtime import benchmark, parse_inputs

    result = benchmark(list(models), threads=threads, repeats=repeats, inputs=parse_inputs(inputs) or None)
    show(plain(result), str(result), as_json)


@app.command()
@click.argument("model")
@click.option("--data", required=True, metavar="DIR", help="Folder of pictures, or a .npy file of inputs (N, C, H, W).")
@click.option("--out", default="model.onnx", show_default=True, metavar="FILE", help="The ONNX file to write.")
@input_shape
@weights_file
@click.option("--samples", default=256, show_default=True, type=click.IntRange(1), help="Inputs to calibrate with.")
@click.option("--bits", default=8, show_default=True, type=click.IntRange(2, 8), help="Bits of the weights.")
@click.option("--observer", default="moving_average", show_default=True, help="How activation ranges are chosen.")
@targets
@as_json
def quantize(
    model: str,
    data: str,
    out: str,
    input_shape: str,
    weights: str | None,
    samples: int,
    bits: int,
    observer: str,
    target: str,
    as_json: bool,
) -> None:
    """Quantize MODEL (module:function) without training: calibrate on DATA, export."""
    from torchopt.data import read_inputs
    from torchopt.export import export
    from torchopt.one_shot import one_shot
    from torchopt.quantize import Quantize
    from torchopt.rules import Rule
    from torchopt.runtime import verify

    shape = _needed_shape(input_shape)
    rules = [Rule("*", quantize=Quantize(weight_bits=bits, observer=observer))]
    network, example = _built(model, weights, shape)
    inputs = read_inputs(data, size=shape, samples=samples)
    final = one_shot(network, rules, inputs.split(32), example_inputs=(example,), target=target)
    result = export(final, (example,), out, target=target)
    verdict = verify(final, out, inputs.split(32))
    show({"export": plain(result), "verify": plain(verdict)}, f"{result}\n{verdict}", as_json)


@app.command()
@click.argument("source")
@as_json
def report(source: str, as_json: bool) -> None:
    """Print the report of a run's folder, or of an ONNX file: one row a weight."""
    from torchopt.report import report, summary_table
    from torchopt.run import read_report

    if Path(source).is_dir():
        found = read_report(source)
        show(found, summary_table(found), as_json)
    else:
        rows = report(source)
        show(rows.to_dict(), str(rows), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(status(arguments))


def status(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        app.main(args=list(arguments) if arguments is not None else None, prog_name="torchopt", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        click.echo(f"torchopt: {one_line(error.format_message())}", err=True)
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("torchopt: stopped", err=True)
        return 130
    except TorchoptError as error:
        click.echo(f"torchopt: {one_line(str(error))}", err=True)
        return 2
    return 0


def one_line(text: str) -> str:
    """Return `text` with line breaks and runs of blanks made into single blanks.

    Example:
        >>> one_line("a\\n  b")
        'a b'
    """
    return " ".join(text.split())


def show(data: object, text: object, as_json: bool) -> None:
    """Print `data` as JSON, or `text`: a string, or anything rich can draw."""
    if as_json:
        click.echo(json.dumps(data, indent=1))
    elif isinstance(text, str):
        click.echo(text)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140).print(text)


def table(rows: Sequence[dict[str, Any]]) -> object:
    """Return a rich table of rows that have the same keys."""
    from rich.table import Table

    drawn = Table(*(rows[0] if rows else ()), box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*("" if value is None else str(value) for value in row.values()))
    return drawn


def plain(result: Any) -> Any:
    """Return a result as what JSON can hold."""
    if hasattr(result, "to_dict"):
        return result.to_dict()
    return json.loads(json.dumps(dataclasses.asdict(result), default=str))


def _needed_shape(text: str | None) -> tuple[int, int, int]:
    parts = (text or "").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"--input-shape: got {text!r}; three numbers C,H,W are needed, such as 3,224,224")
    channels, height, width = map(int, parts)
    return channels, height, width


def _built(source: str, weights: str | None, shape: tuple[int, int, int]) -> tuple[nn.Module, Any]:
    """The network that module:function builds, and an example input."""
    import torch

    from torchopt.models import ImportedModel

    return ImportedModel(import_=source, weights=weights).build().eval(), torch.zeros(1, *shape)


def _finished(folder: str) -> tuple[nn.Module, Any]:
    """The final network of a finished run, and an example input."""
    from torchopt.run import final_model

    return final_model(folder)


if __name__ == "__main__":
    main()
