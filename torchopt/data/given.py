"""Whatever a user has as data becomes batches of a network: pictures, arrays, tensors, tables, or what a function yields.

    pictures/  pictures.tar  pictures.zip   pictures, by a `Preprocess`
    x.npy                                   one array (N, …)
    x.npz  x.pt  x.parquet                  arrays by the names of forward's arguments; a list in x.pt is a list of batches
    module:function                         yields batches

Arrays are taken as they are: floats as float32, other types as the user says (`--input NAME:SIZES:DTYPE`), else as they lie in the file.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.data.containers import NEEDED, dtype_of, listed, read_numpy, read_parquet, read_saved, shown, tensor_of, unpacked
from torchopt.data.pictures import PICTURES, picture_files
from torchopt.data.preprocess import Preprocess
from torchopt.data.samples import Given, cut
from torchopt.data.samples import count as size_of
from torchopt.errors import ConfigError, DataError, FileError, nearest
from torchopt.io.importing import in_users_code, load_callable
from torchopt.io.progress import track
from torchopt.network.batches import Batch, each, pieces
from torchopt.runtime.inputs import InputShape

LABELS = ("label", "labels", "y", "target", "targets")  # of a file, and no arguments of a network
UNSAID = (
    "pictures need what the network was trained with: --preprocess imagenet, pixels (only / 255), weights:NAME, timm, "
    "module:function, or --mean and --std with --resize and --crop"
)


def read_batches(
    source: str,
    model: nn.Module,
    *,
    samples: int = 256,
    inputs: Mapping[str, InputShape] | None = None,
    preprocess: Preprocess | None = None,
) -> Given:
    """Read up to `samples` samples from what `source` names.

    Args:
        source: a path, or "module:function".
        model: the network that they are for.
        samples: how many at most; of pictures and arrays spread evenly.
        inputs: shapes, with the batch, and types of forward's arguments; what is read must fit them.
        preprocess: what is done to pictures.

    Raises:
        FileError: no such file, or one that cannot be read.
        DataError: it holds nothing, or what does not fit the network or `inputs`.
        ConfigError: pictures without a preprocessing, or one for what holds no pictures.
    """
    known, asked = takes(model), dict(inputs or {})
    for name in asked:
        if name not in known and None not in known.values():
            raise ConfigError(
                f"--input: {type(model).__name__} has no input {name!r}; it takes {listed(known)}{nearest(name, known)}"
            )
    path, kind = Path(source), Path(source).suffix.lower()
    if not path.exists() and ":" not in source:
        raise FileError(f"{source}: no such folder or file; {NEEDED}")
    if path.is_dir() or kind in (".tar", ".zip", ".tgz") or source.lower().endswith(".tar.gz"):
        return _pictures(source, asked, samples, preprocess)
    if kind == ".parquet":
        return _parquet(source, known, asked, samples, preprocess)
    _no_pictures(source, preprocess)
    if kind in (".npy", ".npz"):
        return _arrays(source, read_numpy(source), known, asked, samples)
    if kind in (".pt", ".pth"):
        return _saved(source, known, asked, samples)
    if ":" in source and not path.exists():
        return _yielded(source, load_callable(source, where="--data"), asked, samples)
    raise FileError(f"{source}: cannot be read as data; {NEEDED}")


def random_batches(model: nn.Module, inputs: Mapping[str, InputShape], samples: int) -> Given:
    """Return random samples of these shapes, by the names of forward's arguments.

    Raises:
        ConfigError: an input is not the network's, or one of its is missing.
    """
    known = takes(model)
    missing = [name for name, need in known.items() if need and name not in inputs]
    wrong = [name for name in inputs if name not in known and None not in known.values()]
    if missing or wrong:
        what = f"{missing[0]!r} is missing" if missing else f"there is no {wrong[0]!r}"
        raise ConfigError(f"--input: {what}; {type(model).__name__} takes {listed(known)}")
    made, rng = {}, torch.Generator().manual_seed(0)
    for name, wanted in inputs.items():
        dtype, sizes = dtype_of(wanted.dtype or "float32"), (samples, *wanted.shape[1:])
        whole = not dtype.is_floating_point
        made[name] = (torch.randint(0, 2, sizes, generator=rng) if whole else torch.randn(sizes, generator=rng)).to(dtype)
    values: Any = made if len(made) > 1 or not known.get(next(iter(made))) else next(iter(made.values()))
    return cut("random", values, ", ".join(f"{name} {shown(x)}" for name, x in made.items()) + f", {samples} samples")


def takes(model: nn.Module) -> dict[str, bool | None]:
    """Return the names of forward's arguments: True where one is needed, None where it stands for any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: None if p.kind in many else p.default is p.empty for p in parameters}


def _pictures(source: str, asked: Mapping[str, InputShape], samples: int, preprocess: Preprocess | None) -> Given:
    if preprocess is None:
        raise ConfigError(f"--data {source}: {UNSAID}")
    with tempfile.TemporaryDirectory() as folder:
        files = picture_files(unpacked(source, Path(folder)))
        if not files:
            raise DataError(f"{source}: holds no pictures ({', '.join(sorted(PICTURES))}); at least one is needed")
        return _prepared(source, files, asked, samples, preprocess)


def _prepared(source: str, files: Sequence[Any], asked: Mapping[str, InputShape], samples: int, preprocess: Preprocess) -> Given:
    """Pictures in files as batches of one size."""
    if len(asked) > 1:
        raise ConfigError(f"--input: {listed(asked)} are asked for, and pictures give one input; name one")
    shape = next((wanted.shape for wanted in asked.values()), ())
    if shape and len(shape) != 4:
        raise ConfigError(f"--input: got {','.join(map(str, shape))}; pictures need four sizes, such as x:1,3,224,224")
    if shape and shape[1] not in (1, 3):
        raise ConfigError(
            f"{source}: pictures have 1 channel (grey) or 3, and {shape[1]} are asked for by --input; give an .npz file"
        )
    channels = shape[1] if shape else 1 if preprocess.mean is not None and len(preprocess.mean) == 1 else 3
    step = preprocess.fitted((shape[2], shape[3]) if shape else None)
    chosen = [files[i] for i in _spread(len(files), samples)]
    made = [step(file, channels) for file in track(chosen, "reading pictures")]
    sizes = {tuple(x.shape) for x in made}
    if len(sizes) > 1:
        raise DataError(
            f"{source}: its pictures are of {len(sizes)} sizes after preprocessing; --resize and --crop make them equal"
        )
    joined = _fit(source, next(iter(asked), "x"), torch.stack(made), next(iter(asked.values()), None))
    return cut(source, joined, f"{len(made)} pictures {shown(joined)}: {step}")


def _parquet(
    source: str, known: Mapping[str, bool | None], asked: Mapping[str, InputShape], samples: int, preprocess: Preprocess | None
) -> Given:
    table = read_parquet(source, known, lambda count: list(_spread(count, samples)))
    if table.pictures is None:
        _no_pictures(source, preprocess)
        return _arrays(source, table.columns, known, asked, samples)
    if preprocess is None:
        raise ConfigError(f"--data {source}: {UNSAID}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"row {i}" for i in range(len(table.pictures))]
        for file, data in zip(files, table.pictures, strict=True):
            file.write_bytes(data)
        return _prepared(source, files, asked, samples, preprocess)


def _no_pictures(source: str, preprocess: Preprocess | None) -> None:
    if preprocess is not None:
        raise ConfigError(f"--data {source}: holds no pictures, so nothing is preprocessed; leave --preprocess, --mean … out")


def _saved(source: str, known: Mapping[str, bool | None], asked: Mapping[str, InputShape], samples: int) -> Given:
    found = read_saved(source)
    if isinstance(found, torch.Tensor | Mapping):
        return _arrays(source, found, known, asked, samples)
    return _yielded(source, lambda: found, asked, samples)


def _arrays(source: str, found: Any, known: Mapping[str, bool | None], asked: Mapping[str, InputShape], samples: int) -> Given:
    """One array, or several by name, cut into batches."""
    needed = [name for name, need in known.items() if need]
    if not isinstance(found, Mapping):
        name = next(iter(asked), needed[0] if needed else "x")
        value = _fit(source, name, _chosen(tensor_of(source, name, found), samples), asked.get(name))
        return cut(source, value, f"{name} {shown(value)}, {len(value)} samples, as they are")
    named = {name: value for name, value in found.items() if name in needed or name in asked or name not in LABELS}
    if list(named) == ["arr_0"] and len(needed) <= 1:
        return _arrays(source, named["arr_0"], known, asked, samples)
    free = None in known.values()
    wrong = [name for name in named if name not in known and not free]
    missing = [name for name in dict.fromkeys([*needed, *asked]) if name not in named]
    if wrong or missing:
        what = f"no array for {missing[0]!r}" if missing else f"an array {wrong[0]!r} that the network does not take"
        raise DataError(f"{source}: has {what}; it holds {listed(found)}, and the network takes {listed(known)}")
    values = {n: _fit(source, n, _chosen(tensor_of(source, n, v), samples), asked.get(n)) for n, v in named.items()}
    counts = {name: len(value) for name, value in values.items()}
    if len(set(counts.values())) != 1:
        raise DataError(
            f"{source}: its arrays have {', '.join(f'{n}: {c}' for n, c in counts.items())} samples; as many are needed"
        )
    told = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
    return cut(source, values, f"{told}, {next(iter(counts.values()))} samples, as they are")


def _chosen(value: torch.Tensor, samples: int) -> torch.Tensor:
    return value if len(value) <= samples else value[torch.tensor(list(_spread(len(value), samples)))]


def _fit(source: str, name: str, value: torch.Tensor, wanted: InputShape | None) -> torch.Tensor:
    """The value in the type asked for.

    Raises:
        DataError: it is of another shape.
        ConfigError: the type is unknown.
    """
    if wanted is None:
        return value
    if wanted.shape and tuple(value.shape[1:]) != tuple(wanted.shape[1:]):
        asked = ",".join(map(str, wanted.shape[1:]))
        found = ",".join(map(str, value.shape[1:]))
        raise DataError(f"{source}: a sample of {name} is of {found or 'one number'}, and --input says {asked}; they must agree")
    return value if wanted.dtype is None else value.to(dtype_of(wanted.dtype))


def _yielded(source: str, function: Callable[[], Any], asked: Mapping[str, InputShape], samples: int) -> Given:
    batches: list[Batch] = []
    count = 0
    with in_users_code(f"--data: {source}", DataError, function):
        for batch in _iterated(source, function()):
            some = next(iter(pieces(batch, samples - count)))
            batches.append(_checked(source, some, asked))
            count += size_of(some)
            if count >= samples:
                break
    if not count:
        raise DataError(f"--data: {source} gives no batch; at least one is needed")
    return Given(batches=batches, samples=count, told=f"{source}: {count} samples in {len(batches)} batches, as they are")


def _iterated(source: str, found: Any) -> Iterable[Any]:
    batches = each(found)
    for batch in batches:
        if not any(isinstance(x, torch.Tensor) for x in tree_leaves(batch)):
            raise DataError(f"--data: {source} gives a {type(batch).__name__} without tensors; batches of tensors are needed")
        yield batch


def _checked(source: str, batch: Any, asked: Mapping[str, InputShape]) -> Any:
    if not asked:
        return batch
    if isinstance(batch, Mapping):
        missing = next((name for name in asked if name not in batch), None)
        if missing is not None:
            raise DataError(f"{source}: gives no {missing!r}; it gives {listed(batch)}")
        return {name: _fit(source, name, x, asked.get(name)) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if isinstance(batch, torch.Tensor):
        return _fit(source, *next((n, batch, w) for n, w in asked.items()))
    names = list(asked)[: len(batch)]
    return [*(_fit(source, n, x, asked[n]) for n, x in zip(names, batch, strict=False)), *batch[len(names) :]]


def _spread(count: int, samples: int) -> Iterator[int]:
    """Up to `samples` of `count` places, evenly."""
    return (i * count // samples for i in range(samples)) if count > samples else iter(range(count))
