"""The command line: each command reads its arguments, calls the library once, and prints the result (`cli/terminal.py`).

Exit code 0: done. 2: a user's mistake, one line on stderr. 1: a defect, with its traceback. 130, 143: stopped by a signal. What a
command prints as a table it prints as JSON with `--json`. Imports that take long stand inside the commands, for a fast `--help`.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchopt.cli.c_commands import size_of, verify_c
from torchopt.cli.onnx_commands import COMMANDS, as_json
from torchopt.cli.quantize_command import quantize
from torchopt.cli.search_command import search
from torchopt.cli.terminal import Stopped, complain, plain, reason_of, show, table, take_any_encoding, take_signals, tidy_output
from torchopt.errors import ConfigError, TorchoptError
from torchopt.io.files import check_place
from torchopt.io.importing import in_users_code

if TYPE_CHECKING:
    from torch import nn

settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
targets = click.option("--target", default="ort-x86", show_default=True, help="The runtime aimed at.")
weights_file = click.option("--weights", metavar="FILE", help="A state_dict (.pt, .pth, .safetensors) to load first.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="torchopt-toolkit", prog_name="torchopt")
def app() -> None:
    """Prune, cluster and quantize PyTorch models; export one small ONNX file that ONNX Runtime runs fast."""


for command in (*COMMANDS, quantize, search, verify_c):
    app.add_command(command)


@app.command()
@click.argument("recipe")
@click.option("--out", required=True, metavar="DIR", help="Folder for the models and the report.")
@click.option("--resume", is_flag=True, help="Go on with the run that lies in DIR.")
@click.option("--overwrite", is_flag=True, help="Remove the run that lies in DIR and start again.")
@click.option("--unfinished", is_flag=True, help="Run also where training ends before a schedule does: a trial.")
@settings
@as_json
def run(recipe: str, out: str, resume: bool, overwrite: bool, unfinished: bool, settings: Sequence[str], as_json: bool) -> None:
    """Carry out RECIPE: train, compress, export, check, time, report."""
    from torchopt.recipe import load
    from torchopt.report import summary_table
    from torchopt.run import run

    if resume and overwrite:
        raise ConfigError("--resume: cannot be used with --overwrite; give one of the two")
    _named_place("--out", out)
    report = run(load(recipe, settings), out, resume=resume, overwrite=overwrite, unfinished=unfinished)
    if report.get("data"):
        complain(report["data"])
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
    show(rows, table(rows) if rows else "no stage compresses: no rule is given to any weight", as_json)


@app.command()
@click.argument("source")
@click.option("--out", required=True, metavar="FILE", help="The ONNX file to write; C code where it ends in .c.")
@click.option("--input-shape", metavar="C,H,W", help="Shape of one input; needed for module:function.")
@weights_file
@targets
@click.option(
    "--pack", type=click.Choice(["auto", "yes", "no", "smallest"]), default="auto", show_default=True, help="Packed weights."
)
@click.option("--static-batch", is_flag=True, help="Fix the batch size at 1.")
@click.option("--flash", metavar="BYTES", help="Of C code: refuse what takes more flash, such as 256k.")
@click.option("--ram", metavar="BYTES", help="Of C code: refuse what takes more RAM, such as 64k.")
@as_json
def export(
    source: str,
    out: str,
    input_shape: str | None,
    weights: str | None,
    target: str,
    pack: str,
    static_batch: bool,
    flash: str | None,
    ram: str | None,
    as_json: bool,
) -> None:
    """Write an ONNX file, or C code, from SOURCE: the folder of a finished run, module:function, or an ONNX file (to C)."""
    from torchopt.export import export

    _named_place("--out", out, source)
    limits = {"flash": size_of("--flash", flash), "ram": size_of("--ram", ram)}
    if out.endswith(".c") and source.endswith(".onnx"):
        from torchopt.c_code import export_c

        written = export_c(source, (), out, target=target, **limits)
        show(plain(written), str(written), as_json)
        return
    built = re.fullmatch(r"[\w.]+:[\w.]+", source) is not None and not Path(source).is_dir()
    if built:
        check_place(out)
    model, example = _built(source, weights, _needed_shape(input_shape)) if built else _finished(source)
    packing = {"yes": True, "no": False}.get(pack, pack)
    with in_users_code("export"):
        result = export(model, (example,), out, target=target, dynamic_batch=not static_batch, pack=packing, **limits)  # type: ignore[arg-type]
    show(plain(result), str(result), as_json)


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
    take_signals()
    take_any_encoding()
    sys.exit(status(arguments))


def status(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with tidy_output(apart="--json" in given):
            app.main(args=given, prog_name="torchopt", standalone_mode=False)
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        complain(error.format_message())
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        complain("stopped")
        return 128 + signal.SIGINT
    except Stopped as stopped:
        if stopped.name != "SIGPIPE":
            complain(
                f"stopped by {stopped.name}{'; the same command with --resume goes on' if given[:1] in (['run'], ['search']) else ''}"
            )
        return 128 + stopped.number
    except TorchoptError as error:
        complain(str(error))
        return 2
    except MemoryError:
        complain("memory ran out; a smaller model, batch or picture size is needed")
        return 2
    except OSError as error:
        reason = reason_of(error)
        if reason is None:
            raise
        complain(reason)
        return 2
    return 0


def _needed_shape(text: str | None) -> tuple[int, int, int]:
    parts = (text or "").split(",")
    if len(parts) != 3 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"--input-shape: got {text!r}; three numbers C,H,W are needed, such as 3,224,224")
    channels, height, width = map(int, parts)
    return channels, height, width


def _built(source: str, weights: str | None, shape: tuple[int, int, int]) -> tuple[nn.Module, Any]:
    """The network that module:function builds, and an example input."""
    import torch

    from torchopt.models import ImportedModel

    with in_users_code("--input-shape", ConfigError):
        example = torch.zeros(1, *shape, dtype=torch.float32)
    return ImportedModel(import_=source, weights=weights).build().eval(), example


def _named_place(option: str, place: str, *inputs: str | None) -> None:
    """Refuse an empty name, and one of a file that is read."""
    if not place.strip():
        raise ConfigError(f"{option}: is empty; the name of what to write is needed")
    for given in inputs:
        if given is not None and Path(place).exists() and Path(given).exists() and Path(place).samefile(given):
            raise ConfigError(f"{option}: {place} is what is read; the name of another file is needed")


def _finished(folder: str) -> tuple[nn.Module, Any]:
    """The final network of a finished run, and an example input."""
    from torchopt.run import final_model

    return final_model(folder)


if __name__ == "__main__":
    main()
