"""The commands that take an ONNX file of anyone's: pack, unpack, inspect, bench, compress. `cli/commands.py` adds them to the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from torchopt.cli.terminal import plain, say, show
from torchopt.errors import FileError
from torchopt.io.files import check_place

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
sizes = "What a file runs on: x:1,3,320,320; once for each input."
run_inputs = click.option("--input", "inputs", multiple=True, metavar="NAME:SIZES[:DTYPE]", help=sizes)


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--strip", is_flag=True, help="Leave out torch's exporter's notes on nodes (source lines, module names).")
@click.option("--smallest", is_flag=True, help="Near the entropy; loading takes longer, running does not.")
@as_json
def pack(source: str, destination: str, strip: bool, smallest: bool, as_json: bool) -> None:
    """Write the weights of any ONNX file in their smallest exact form."""
    from torchopt.pack import pack
    from torchopt.report.file_bytes import file_bytes

    result = pack(source, destination, strip=strip, smallest=smallest)
    parts = file_bytes(destination)
    line = "the file's bytes: " + ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
    show(plain(result) | {"bytes": parts}, f"{result}\n{line}", as_json)


@click.command()
@click.argument("source")
@click.argument("destination")
def unpack(source: str, destination: str) -> None:
    """Write a packed ONNX file's weights densely again, bit for bit."""
    from torchopt.export import unpack

    unpack(source, destination)
    say(f"{destination}: {Path(destination).stat().st_size:,} bytes")


@click.command()
@click.argument("model")
@as_json
def inspect(model: str, as_json: bool) -> None:
    """Say which layers of an ONNX file run as integers in ONNX Runtime, which fell back, and why."""
    from torchopt.runtime import inspect

    result = inspect(model)
    show(plain(result), str(result), as_json)


@click.command()
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


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "--weights", type=click.Choice(["int8", "int4", "float16"]), help="What the weights become; int8 where nothing is said."
)
@click.option("--clusters", type=click.IntRange(2, 256), help="Instead: so many shared values a weight.")
@click.option(
    "--activations", type=click.Choice(["float", "dynamic", "static"]), help="Integers need dynamic, or static with data."
)
@click.option("--calibration", metavar="FILE.npz", help="One array an input, rows first: for static, and for the comparison.")
@click.option(
    "--method", type=click.Choice(["minmax", "percentile", "entropy"]), default="minmax", help="How static finds ranges."
)
@click.option("--no-pack", is_flag=True, help="Leave the weights dense.")
@click.option("--overwrite", is_flag=True, help="Write over DESTINATION.")
@run_inputs
@as_json
def compress(
    source: str,
    destination: str,
    weights: str | None,
    clusters: int | None,
    activations: str | None,
    calibration: str | None,
    method: str,
    no_pack: bool,
    overwrite: bool,
    inputs: Sequence[str],
    as_json: bool,
) -> None:
    """Write an ONNX file without its source with smaller weights; say how like the original it is, and how fast."""
    from torchopt.onnx_to_onnx import compress_onnx
    from torchopt.runtime import parse_inputs

    check_place(destination)
    if Path(destination).exists() and not overwrite:
        raise FileError(f"{destination}: is there already; name another file, or --overwrite writes over it")
    result = compress_onnx(
        source,
        destination,
        weights=weights,
        n_clusters=clusters,
        activations=activations,
        calibration=calibration,
        method=method,
        inputs=parse_inputs(inputs) or None,
        pack=not no_pack,
    )
    show(result.to_dict(), str(result), as_json)


COMMANDS = (pack, unpack, inspect, bench, compress)
