"""How the command line meets its terminal: results on stdout, everything else on stderr, each mistake and each warning one line.

A signal that asks to end (SIGINT, SIGTERM, SIGHUP) is an exception, so that what is being written is finished or removed on the way
out. Standard output may be a full disk, a closed pipe, or know ASCII only; with `--json` it holds one document and nothing that a
user's own code prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TextIO

from torchopt.errors import FileError

ENVIRONMENT = {  # what a machine, not a program, is at fault for
    getattr(errno, name, None)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "EACCES",
        "EPERM",
        "EIO",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "ENAMETOOLONG",
        "ELOOP",
    )
}
ENDS = ("SIGINT", "SIGTERM", "SIGHUP")
_answers: ContextVar[TextIO | None] = ContextVar("answers", default=None)


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


def take_signals() -> None:
    """Raise `Stopped` on the signals that ask to end; those that the parent told to ignore (nohup) stay ignored."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    for name in ENDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def take_any_encoding() -> None:
    """Print a question mark for what the terminal's encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def tidy_output(*, apart: bool) -> Iterator[None]:
    """Write warnings as one line each; where `apart`, send to stderr whatever else is printed to stdout meanwhile."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.showwarning = _one_line_warning
        token = _answers.set(sys.stdout)
        stack.callback(_answers.reset, token)
        if apart:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def say(text: str) -> None:
    """Print a result on stdout, at once.

    Raises:
        FileError: it cannot be written.
        Stopped: whoever read it has ended.
    """
    out = _answers.get() or sys.stdout
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:
        _give_up(out)
        raise Stopped(signal.SIGPIPE) from None
    except OSError as error:
        _give_up(out)
        raise FileError(f"stdout: cannot be written ({error.strerror}); free space, or send it elsewhere") from error


def show(data: object, text: object, as_json: bool) -> None:
    """Print `data` as JSON, or `text`: a string, or anything rich can draw."""
    if as_json:
        say(json.dumps(data, indent=1))
    elif isinstance(text, str):
        say(text)
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 140)
        with console.capture() as drawn:
            console.print(text)
        say(drawn.get().rstrip("\n"))


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


def complain(text: str) -> None:
    """Print one line on stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        print(f"torchopt: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return `text` with line breaks and runs of blanks made into single blanks.

    Example:
        >>> one_line("a\\n  b")
        'a b'
    """
    return " ".join(text.split())


def reason_of(error: OSError) -> str | None:
    """Say in one sentence what the machine lacks; None where the program may be at fault."""
    if "temporary directory" in str(error):
        return f"{error.strerror or error}; set TMPDIR to a folder that can be written"
    if error.errno not in ENVIRONMENT:
        return None
    return f"{error.filename or 'a file'}: {error.strerror}; free or permit it, or choose another place"


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    complain(f"warning: {message}")


def _give_up(out: TextIO) -> None:
    """Nothing can be printed any more: keep the interpreter from trying again as it ends."""
    with contextlib.suppress(OSError, ValueError):
        empty = os.open(os.devnull, os.O_WRONLY)
        os.dup2(empty, out.fileno())
        os.close(empty)
