"""The commands for C code: `verify-c`, and what `export` does where --out ends in .c."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from torchopt.cli.onnx_commands import as_json
from torchopt.cli.terminal import show
from torchopt.errors import ConfigError, FileError

UNITS = {"": 1, "k": 1024, "m": 1024**2}


@click.command("verify-c")
@click.argument("source")
@click.argument("code")
@click.option("--data", metavar="DIR", help="Folder of pictures, or a .npy file of inputs (N, …); random numbers without it.")
@click.option("--samples", default=100, show_default=True, type=click.IntRange(1), help="Inputs on this machine.")
@click.option("--board-samples", default=10, show_default=True, type=click.IntRange(1), help="Inputs in each emulator.")
@click.option(
    "--machine",
    "machines",
    multiple=True,
    metavar="NAME",
    help="host, host-fast, cortex-m4 or cortex-m7; repeatable; all but host-fast.",
)
@as_json
def verify_c(
    source: str, code: str, data: str | None, samples: int, board_samples: int, machines: Sequence[str], as_json: bool
) -> None:
    """Compile CODE, written from SOURCE (a run's folder or an ONNX file), and compare every step with ONNX Runtime."""
    from torchopt.c_code import verify_c

    model: Any = source
    if Path(source).is_dir():
        from torchopt.run import final_model

        model, example = final_model(source)
        shape = tuple(example.shape[1:])
    else:
        shape = _shape(source)
    inputs = _inputs(data, shape, samples)
    verdict = verify_c(model, code, [inputs], board_samples=board_samples, **({"machines": tuple(machines)} if machines else {}))
    show(verdict.to_dict(), str(verdict), as_json)
    if not verdict.equal and any(not m.skipped for m in verdict.machines):
        raise FileError(f"{code}: does not compute what {source} does; this is a defect, or the file was changed")


def size_of(option: str, text: str | None) -> int | None:
    """Return the bytes that a text such as 256k or 1m says.

    Raises:
        ConfigError: it says none.

    Example:
        >>> size_of("--ram", "64k"), size_of("--ram", None)
        (65536, None)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([km]?)b?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{option}: got {text!r}; a number of bytes is needed, such as 65536, 64k or 1m")
    return int(match[1]) * UNITS[match[2]]


def _shape(path: str) -> tuple[int, ...]:
    from torchopt.c_code.export import read_file
    from torchopt.c_code.finished import finished

    found = finished(read_file(path), path)
    inputs = found.everything.get_inputs()
    if len(inputs) != 1:
        raise ConfigError(f"{path}: has {len(inputs)} inputs; with more than one, call torchopt.verify_c from Python")
    return tuple(inputs[0].shape[1:])


def _inputs(data: str | None, shape: tuple[int, ...], samples: int) -> Any:
    import numpy as np

    if data is None:
        return np.random.default_rng(0).normal(size=(samples, *shape)).astype(np.float32)
    if data.endswith(".npy"):
        try:
            return np.load(data)[:samples]
        except (OSError, ValueError) as error:
            raise FileError(f"{data}: cannot be read as an array ({str(error)[:100]}); numpy.save writes one") from error
    from torchopt.data import read_inputs

    if len(shape) != 3:
        raise ConfigError(f"--data: pictures are (C, H, W), and the input is {shape}; a .npy file is needed")
    return read_inputs(data, size=shape, samples=samples).numpy()
