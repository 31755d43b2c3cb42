"""Pictures on disk: which files of a folder are pictures, how one is opened, and what the folders of a data set mean.

1. root/train/<class>/… and root/val/<class>/…      the usual split; test, valid, validation, testing, eval are names of the second too
2. root/<class>/…                                   no split: the reader makes one
3. hidden folders and files (.ipynb_checkpoints)     never classes, never pictures

What is neither 1 nor 2 is refused: split folders beside others that hold pictures, one class alone, the same class names on one side
only. A picture that cannot be read is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchopt.errors import DataError, FileError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
TRAINING = ("train", "training")
TESTING = ("test", "val", "valid", "validation", "testing", "eval")  # where several are there, the first is taken
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where the classes lie: the folder to train on, the one to test on (None: split here), and what is to be said about it."""

    train: Path
    test: Path | None
    note: str


def open_picture(path: Path, channels: int) -> Any:
    """Return a picture of 8 bits a channel, grey or RGB.

    Raises:
        FileError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode in SIXTEEN_BITS:  # PIL's conversion would make everything above 255 white
                grey = Image.fromarray((np.asarray(opened).astype(np.uint16) >> 8).astype(np.uint8))
                return grey.convert("RGB" if channels == 3 else "L")
            return opened.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises each of these on damaged files
        reason = "it is a link to nothing" if path.is_symlink() and not path.exists() else _reason(error)
        raise FileError(f"{path}: is no picture that can be read ({reason}); remove it or replace it") from error


def picture_files(folder: Path) -> list[Path]:
    """List the pictures in a folder of any depth, in the order of their names; hidden files and folders are left out."""
    return sorted(_below(folder))


def split_of(root: Path) -> Split:
    """Say where a folder's training and test pictures lie.

    Raises:
        FileError: the folder is missing.
        DataError: its layout can be read in two ways.
    """
    if not root.is_dir():
        raise FileError(f"{root}: no such folder; data.root must hold one folder of pictures a class")
    folders = {path.name.lower(): path for path in _folders(root)}
    train = next((folders[name] for name in TRAINING if name in folders), None)
    tests = [folders[name] for name in TESTING if name in folders]
    if train is None or not (tests or len(folders) == 1):
        return Split(train=root, test=None, note="")
    known = {train, *tests}
    others = [path for path in folders.values() if path not in known and next(_below(path), None) is not None]
    if others:
        raise DataError(
            f"{root}: holds {train.name}/ and {tests[0].name}/ beside {others[0].name}/, which may be a split or classes; "
            "give a folder with classes alone, or with the split alone"
        )
    if not tests:
        return Split(
            train=train, test=None, note=f"{train}: its classes are split here; there is no folder for testing beside it"
        )
    unread = f"; {', '.join(f'{path.name}/' for path in tests[1:])} is not read" if len(tests) > 1 else ""
    return Split(train=train, test=tests[0], note=f"{root}: {train.name}/ is for training, {tests[0].name}/ for testing{unread}")


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class, by the names of the folders.

    Raises:
        FileError: there is no class, or one without pictures.
        DataError: there is one class alone.
    """
    found = {path.name: picture_files(path) for path in _folders(folder)}
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        what = f"the class {empty[0]!r} holds no picture" if found else "there is no folder in it"
        raise FileError(f"{folder}: {what}; one folder of pictures a class is needed ({', '.join(sorted(PICTURES))})")
    if len(found) == 1:
        raise DataError(
            f"{folder}: holds one class, {next(iter(found))!r}; one folder for each of at least two classes is needed"
        )
    return found


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        raise FileError(f"{folder}: cannot be read ({error.strerror}); a folder of pictures is needed") from error


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [f for f in folders if not f.startswith(".") and not _leads_back(os.path.join(place, f), real)]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURES:
                yield Path(place, name)


def _leads_back(path: str, place: str) -> bool:
    """True for a link to a folder that it lies in: following it would never end."""
    return os.path.islink(path) and (place + os.sep).startswith(os.path.realpath(path) + os.sep)


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or str(error).splitlines()[0].split(" '/")[0][:120] if str(error) else type(error).__name__
