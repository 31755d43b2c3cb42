"""Files that hold data: packed pictures, numpy's and torch's arrays, and parquet tables; each read without running code of theirs."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchopt.errors import ConfigError, DataError, FileError

NEEDED = "a folder of pictures, .tar, .zip, .npy, .npz, .pt, .parquet, or module:function is needed"


def unpacked(source: str, folder: Path) -> Path:
    """Return the folder that a folder, .tar or .zip stands for; packed files are written to `folder`.

    Raises:
        FileError: it is missing or damaged.
    """
    path = Path(source)
    if path.is_dir():
        return path
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as packed:
                packed.extractall(folder)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
    except FileNotFoundError:
        raise FileError(f"{source}: no such file; {NEEDED}") from None
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise FileError(f"{source}: cannot be unpacked ({error}); pack the pictures again") from error
    return folder


def read_numpy(source: str) -> Any:
    """Return one array, or several by name.

    Raises:
        FileError: the file is missing or no such file.
    """
    try:
        found = np.load(source, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise FileError(f"{source}: no such file; {NEEDED}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"{source}: cannot be read as arrays ({error}); save them with numpy.save or numpy.savez") from error


def read_saved(source: str) -> Any:
    """Return what `torch.save` wrote; no pickled code is run.

    Raises:
        FileError: the file is missing, or holds more than tensors and plain data.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"{source}: no such file; {NEEDED}") from None
    except Exception as error:  # pickle, zip and torch raise classes of their own
        raise FileError(
            f"{source}: cannot be read as tensors ({type(error).__name__}); save tensors, or dicts or lists of them"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Table:
    """A parquet file's rows: arrays by column, and the bytes of one column of pictures, if there is one."""

    columns: dict[str, np.ndarray]
    pictures: list[bytes] | None


def read_parquet(source: str, names: Iterable[str], rows: Callable[[int], Sequence[int]]) -> Table:
    """Return the columns of those names, or the column of pictures.

    Args:
        source: the file.
        names: columns that are wanted.
        rows: which of so many rows are read.

    Raises:
        FileError: the file is missing or damaged, or pyarrow is not installed.
        DataError: several columns hold pictures, or rows differ in length.
    """
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise FileError(f"{source}: needs pyarrow, which is not installed; install it, or give an .npz file") from None
    try:
        table = parquet.read_table(source)
    except (OSError, ArrowException) as error:
        raise FileError(f"{source}: cannot be read as parquet ({str(error).splitlines()[0][:200]}); write it again") from error
    if not len(table):
        raise DataError(f"{source}: has no row; at least one is needed")
    table = table.take(list(rows(len(table))))
    found = [f.name for f in table.schema if types.is_binary(f.type) or (types.is_struct(f.type) and "bytes" in f.type.names)]
    if len(found) > 1:
        raise DataError(f"{source}: has {len(found)} columns of pictures, {listed(found)}; write a file with one")
    cells = table[found[0]].to_pylist() if found else []
    pictures = [(cell["bytes"] if isinstance(cell, dict) else cell) or b"" for cell in cells]
    wanted = [] if found else [name for name in table.column_names if name in set(names)]
    columns = {name: _column(source, name, table[name].to_pylist()) for name in wanted}
    return Table(columns=columns, pictures=pictures if found else None)


def _column(source: str, name: str, rows: list[Any]) -> np.ndarray:
    try:
        return np.asarray(rows)
    except ValueError:
        raise DataError(f"{source}: the rows of {name} are of different lengths; pad them, or give module:function") from None


def tensor_of(source: str, name: str, value: Any) -> torch.Tensor:
    """Return numbers with the samples along the first axis, as a tensor: floats as float32.

    Raises:
        DataError: they are no such numbers.
    """
    array = value.numpy(force=True) if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16 else value
    if isinstance(array, np.ndarray) and (array.dtype.kind not in "fiub" or array.ndim == 0 or array.shape[0] == 0):
        raise DataError(
            f"{source}: {name} is {array.dtype} of shape {array.shape}; numbers with the samples along the first axis are needed"
        )
    if not isinstance(array, np.ndarray | torch.Tensor):
        raise DataError(f"{source}: {name} is a {type(value).__name__}; an array of numbers is needed")
    found = torch.as_tensor(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise DataError(f"{source}: {name} holds NaN or infinity; finite numbers are needed")
    return found.float() if found.is_floating_point() else found


def dtype_of(name: str) -> torch.dtype:
    """Return torch's type of that name.

    Raises:
        ConfigError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"--input: got the type {name!r}; a type such as float32, int64 or bool is needed")
    return found


def shown(value: torch.Tensor) -> str:
    """Return the shape of a sample, and its type, as text."""
    return f"{'×'.join(map(str, value.shape[1:])) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"


def listed(names: Iterable[str]) -> str:
    """Return names in a row."""
    return ", ".join(names) or "nothing"
