"""What each weight of a model, or of an ONNX file, has become: one row a weight, and totals.

`bytes` is what the weight takes in a file, with its scales: for a torch model, the smaller of what `export` writes densely and the
packed form (codes, table, positions); for an ONNX file, what lies there. A model in training is shown as `finalize` would bake it
now. `entropy_bits` is the order-0 entropy of its values, in bits a weight: no code that treats weights one by one can be smaller.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt.channels import Shrunken, shrunken_of, skipped_of
from torchopt.codecs import encode
from torchopt.compress.verbs import finalize
from torchopt.errors import StateError
from torchopt.export.passes.weights.block_weights import two_a_byte
from torchopt.export.passes.weights.half_weights import held
from torchopt.io.importing import unnoticed
from torchopt.network.grid import Grid, grids
from torchopt.network.weights import Skipped, Weight, custom_weights, is_pruned, noted, weights
from torchopt.report.stored import stored
from torchopt.state.counter import find_state, require_state

with unnoticed():
    from rich.console import Console
    from rich.table import Table

FEW_ZEROS = 0.05  # share of zeros up to which nobody pruned


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight.

    Attributes:
        name: as in the `state_dict`.
        shape: of the dense tensor.
        sparsity: fraction of zeros, in [0, 1].
        distinct_values: how many different values it holds; different integers, where it lies on an integer grid.
        bits: bits a weight, in a file.
        bytes: in a file: packed for a torch model, as they lie there for an ONNX file.
        entropy_bits: order-0 entropy of the values, bits a weight.
        techniques: what stands on it or is seen in it: "pruned", "clustered", "int8", …
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    distinct_values: int
    bits: float
    bytes: int
    entropy_bits: float
    techniques: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A row a weight, what was left alone and why, and what `shrink` did before, if anything."""

    rows: list[Row]
    skipped: list[Skipped]
    shrunken: Shrunken | None = None

    @property
    def totals(self) -> dict[str, Any]:
        """Weights, bytes, sparsity over all weights, and mean bits a weight."""
        count = sum(int(np.prod(row.shape)) for row in self.rows)
        zeros = sum(row.sparsity * int(np.prod(row.shape)) for row in self.rows)
        size = sum(row.bytes for row in self.rows)
        bound = sum(row.entropy_bits * int(np.prod(row.shape)) for row in self.rows) / 8
        return {
            "weights": count,
            "bytes": size,
            "sparsity": zeros / count if count else 0.0,
            "bits": 8 * size / count if count else 0.0,
            "entropy_bytes": round(bound),
        }

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "totals": self.totals,
            "skipped": [asdict(skip) for skip in self.skipped],
            "shrunken": None if self.shrunken is None else self.shrunken.to_dict(),
        }

    def __str__(self) -> str:
        table = Table()
        for name in ("weight", "shape", "zeros", "values", "bits", "bytes", "entropy bits", ""):
            table.add_column(name, justify="left" if name in ("weight", "shape", "") else "right")
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            cells = (
                f"{row.sparsity:.1%}",
                f"{row.distinct_values:,}",
                f"{row.bits:.2f}",
                f"{row.bytes:,}",
                f"{row.entropy_bits:.2f}",
            )
            table.add_row(row.name, shape, *cells, " ".join(row.techniques))
        totals = self.totals
        sums = (f"{totals['sparsity']:.1%}", "", f"{totals['bits']:.2f}", f"{totals['bytes']:,}", "", "")
        table.add_section()
        table.add_row("total", f"{totals['weights']:,} weights", *sums)
        console = Console(width=130)
        with console.capture() as capture:
            console.print(table)
        left = "".join(f"left alone by {s.technique}: {s.name}: {s.reason}\n" for s in self.skipped)
        return capture.get() + left + (f"{self.shrunken}\n" if self.shrunken is not None else "")


def report(model_or_path: nn.Module | str | os.PathLike[str]) -> Report:
    """Report on the weights of a torch model (before, during or after compression) or of an ONNX file.

    Raises:
        FileError: the file is missing, damaged, or no ONNX file.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
        >>> row = report(layer).rows[0]
        >>> row.sparsity, row.distinct_values, row.bytes
        (0.625, 3, 32)
    """
    if isinstance(model_or_path, nn.Module):
        return _of_model(model_or_path)
    return _of_file(Path(model_or_path))


def entropy_bits(value: np.ndarray) -> float:
    """Return the order-0 entropy of the values of an array, in bits an element.

    Example:
        >>> entropy_bits(np.array([0.0, 0.0, 1.0, 1.0]))
        1.0
    """
    _, counts = np.unique(value, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def _of_model(model: nn.Module) -> Report:
    found = require_state(model, "report") if find_state(model) is not None else None
    inner, skipped = (found[0], found[1].skipped) if found else (model, list(noted(model)))
    masked = {weight.name for weight in weights(inner) if is_pruned(weight.module, weight.param)}
    shown = _as_baked(model) if found else inner
    known = grids(shown)
    shown_weights = [*weights(shown), *_of_no_layer(shown)]
    rows = [_weight_row(weight, known.get(weight.name), masked=weight.name in masked) for weight in shown_weights]
    if known:
        skipped = [*skipped, *_without_integers(shown_weights, rows, skipped, known)]
    return Report(rows=rows, skipped=[*skipped_of(inner), *skipped], shrunken=shrunken_of(inner))


def _of_no_layer(shown: nn.Module) -> list[Weight]:
    """Parameters of anyone's own modules; those that a parametrization computes a weight from are in the weight's row."""
    if find_state(shown):  # ranges are not known yet, and what learns them stands between the layers
        return []
    return [w for w in custom_weights(shown, frozen=True) if not isinstance(w.module, parametrize.ParametrizationList)]


def _without_integers(found: list[Weight], rows: list[Row], skipped: list[Skipped], known: dict[str, Grid]) -> list[Skipped]:
    """A reason for each weight of a quantized model that has neither integers, nor half precision, nor a reason."""
    told = {skip.name for skip in skipped if skip.technique == "quantize"}
    written = [weight for weight in found if weight.name in known]
    left = []
    for weight, row in zip(found, rows, strict=True):
        if weight.name in known or "float16" in row.techniques or told & {weight.name, weight.module_name}:
            continue
        left.append(Skipped(name=weight.name, technique="quantize", reason=_why_float(weight, written)))
    return left


def _why_float(weight: Weight, written: list[Weight]) -> str:
    value = weight.value
    twin = next((w for w in written if w.value.shape == value.shape and torch.equal(w.value, value)), None)
    if twin is not None:
        return f"has the values of {twin.name}, which is written as integers; this copy stays float"
    if weight.kind == "custom":
        return "is read by code of the model's own, not as the weight of a known layer; it stays float"
    return "no rule quantizes it, or its layer was left float; it stays float"


def _as_baked(prepared: nn.Module) -> nn.Module:
    """What the weights would become now; as they are where that is not decided yet: no ranges, soft shares."""
    try:
        return finalize(prepared, unfinished=True)
    except StateError:
        return require_state(prepared, "report")[0]


def _weight_row(weight: Weight, grid: Grid | None, *, masked: bool) -> Row:
    """A row as `export` writes the weight: float32 or float16, bytes, or two codes to a byte in blocks."""
    value, standing = weight.value.detach().cpu(), ("masked",) if masked else ()
    if grid is None:
        written = held(value.float().numpy())
        packed = encode(written)
        size = min(written.nbytes, packed.payload_bytes if packed else written.nbytes)
        half = written.dtype == np.float16
        return _row(weight.name, written.astype(np.float32), size, 16 if half else None, "float16", standing)
    symbols = grid.codes(value).numpy()
    dense = symbols if grid.block is None else two_a_byte(symbols, grid.block)
    packed = encode(dense)
    size = min(dense.nbytes, packed.payload_bytes if packed else dense.nbytes) + held(grid.scale.numpy()).nbytes
    return _row(weight.name, symbols, size, grid.bits, "int", standing)


def _of_file(path: Path) -> Report:
    return Report(rows=[_row(s.name, s.symbols, s.bytes, s.bits, s.kind, ()) for s in stored(path)], skipped=[])


def _row(name: str, value: np.ndarray, size: int, bits: int | None, kind: str, standing: tuple[str, ...]) -> Row:
    """A row from a weight's symbols: its integers where it has a grid, else its values."""
    zeros, distinct = float((value == 0).mean()), len(np.unique(value))
    bits = _needed(value, bits) if kind == "int" and bits is not None else bits
    seen = list(standing)
    if zeros > FEW_ZEROS and "masked" not in seen and (kind != "int" or not _by_rounding(value, zeros)):
        seen.append("pruned")
    if distinct <= 256 and value.size >= 8 * distinct and (bits is None or distinct < 2 ** (bits - 1)):
        seen.append("clustered")
    if bits is not None:
        seen.append(f"int{bits}" if kind == "int" else kind)
    return Row(
        name=name,
        shape=tuple(value.shape),
        sparsity=zeros,
        distinct_values=distinct,
        bits=8 * size / value.size,
        bytes=size,
        entropy_bits=entropy_bits(value),
        techniques=tuple(seen),
    )


def _needed(codes: np.ndarray, bits: int) -> int:
    """The bits of a signed grid that holds the codes; a file may hold them in wider integers."""
    low, high = int(codes.min()), int(codes.max())
    return min(bits, max(2, max(high, -low - 1).bit_length() + 1))


def _by_rounding(codes: np.ndarray, zeros: float) -> bool:
    """Whether so many codes are 0 only since small weights are rounded to it.

    Weights as training leaves them have about a log-concave density (Gauss, Laplace): p(0) · p(2) ≤ p(1)². Masks break that.
    """
    one, two = (float((np.abs(codes) == k).mean()) / 2 for k in (1, 2))
    return one > 0 and zeros * two <= 2 * one**2
