"""Where data comes from: scikit-learn's digits, Fashion-MNIST, spoken digits, a folder of pictures, or the user's own function.

Each source is one configuration class with a `load()`; its fields are the keys under `data:` in a recipe. Files are looked for
in `root`, else in `$TORCHOPT_DATA`, else in `../shared/data` beside the working folder; nothing is ever downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from torchopt.data.dataset import Dataset, generator
from torchopt.data.pictures import classes_of, open_picture, split_of
from torchopt.errors import ConfigError, DataError, FileError
from torchopt.io.importing import in_users_code, load_callable
from torchopt.io.progress import track

GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TEN = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Handwritten digits of scikit-learn (1,797 pictures of 8×8), bundled with it; split once, stratified by class.

    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository (1998).

    Attributes:
        test_fraction: share of each class that is kept for testing.

    Example:
        >>> data = Digits().load()
        >>> data.train_inputs.shape, len(data.test_inputs)
        (torch.Size([1437, 1, 8, 8]), 360)
    """

    kind: ClassVar[str] = "digits"

    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0.05 <= self.test_fraction <= 0.5:
            raise ConfigError(f"Digits.test_fraction: got {self.test_fraction}; between 0.05 and 0.5 is needed")

    def load(self) -> Dataset:
        """Return the pictures, scaled to mean 0 and standard deviation 1 over the training part."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        x = x.astype(np.float32).reshape(-1, 1, 8, 8)
        train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=self.test_fraction, random_state=0, stratify=y)
        mean, std = train_x.mean(), train_x.std()
        return _dataset((train_x - mean) / std, train_y, (test_x - mean) / std, test_y, TEN)


@dataclass(frozen=True, kw_only=True)
class FashionMnist:
    """Pictures of garments, 28×28 grey, 60,000 + 10,000. Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747.

    Attributes:
        root: the folder with the four gzip files of the release, or a torchvision root; None looks in the usual places.
        train_samples: use only the first so many training pictures; None is all.
        test_samples: the same for testing.
    """

    kind: ClassVar[str] = "fashion_mnist"

    root: str | None = None
    train_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_samples", "test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"FashionMnist.{name}: got {value}; at least 1, or None for all")

    def load(self) -> Dataset:
        """Return the pictures with the release's mean 0.2860 and standard deviation 0.3530 taken out.

        Raises:
            FileError: the files are not found or damaged.
        """
        folder = _folder(self.root, ("fashion-mnist", "FashionMNIST/raw"), "train-images-idx3-ubyte.gz", "Fashion-MNIST")
        parts = []
        for part, limit in (("train", self.train_samples), ("t10k", self.test_samples)):
            x = (read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:limit, None].astype(np.float32) / 255 - 0.2860) / 0.3530
            parts.append((x, read_idx(folder / f"{part}-labels-idx1-ubyte.gz")[:limit]))
        (train_x, train_y), (test_x, test_y) = parts
        return _dataset(train_x, train_y, test_x, test_y, GARMENTS)


@dataclass(frozen=True, kw_only=True)
class SpokenDigits:
    """Spoken English digits (Free Spoken Digit Dataset), as log-spectrogram pictures 1×32×32 of one second.

    The official split: takes 0 to 4 of each speaker and digit are for testing.

    Attributes:
        root: the folder with `fsdd.npz`; None looks in the usual places.
    """

    kind: ClassVar[str] = "spoken_digits"

    root: str | None = None

    def load(self) -> Dataset:
        """Return the spectrograms, scaled to mean 0 and standard deviation 1 over the training part.

        Raises:
            FileError: the file is not found or damaged.
        """
        path = _folder(self.root, ("fsdd",), "fsdd.npz", "the spoken digits") / "fsdd.npz"
        try:
            with np.load(path) as archive:
                z = {name: archive[name] for name in ("audio", "start", "length", "label", "take")}
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise FileError(f"{path}: not the spoken-digits archive ({error}); copy it again") from error
        clips = [z["audio"][s : s + n] for s, n in zip(z["start"], z["length"], strict=True)]
        x = torch.stack([spectrogram(torch.from_numpy(c.astype(np.float32) / 32768)) for c in clips])[:, None]  # (N, 1, 32, 32)
        test = torch.from_numpy(z["take"] < 5)
        x = (x - x[~test].mean()) / x[~test].std()
        y = torch.from_numpy(z["label"].astype(np.int64))
        return Dataset(train_inputs=x[~test], train_labels=y[~test], test_inputs=x[test], test_labels=y[test], classes=TEN)


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Pictures in one folder a class: root/train/<class>/*.jpg and root/val/<class>/*.jpg, or root/<class>/ split here.

    `test` and other usual names stand for `val`; where both are there, `test` is read. Hidden folders are no classes.

    Attributes:
        root: the folder.
        image_size: pictures are resized so that the short side is this, then cropped in the middle to a square.
        channels: 1 (grey) or 3.
        test_fraction: share that is kept for testing, where the folder is not split already.
    """

    kind: ClassVar[str] = "image_folder"

    root: str
    image_size: int
    channels: int = 3
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ConfigError(f"ImageFolder.image_size: got {self.image_size}; at least 8 pixels are needed")
        if self.channels not in (1, 3):
            raise ConfigError(f"ImageFolder.channels: got {self.channels}; 1 or 3 is needed")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"ImageFolder.test_fraction: got {self.test_fraction}; between 0 and 1 is needed")

    def load(self) -> Dataset:
        """Read all pictures into memory, scaled to mean 0 and standard deviation 1 over the training part.

        Raises:
            FileError: the folder is missing or holds no pictures, or one of them cannot be read.
            DataError: there is one class alone, or the folder can be read as classes and as a split.
        """
        split = split_of(Path(self.root))
        classes = classes_of(split.train)
        train_x, train_y = self._read(classes)
        files = _names_and_sizes(split.train, classes)
        if split.test is not None:
            others = classes_of(split.test)
            if list(others) != list(classes):
                ours, theirs = (f"{p.name}/ has the classes {list(c)}" for p, c in ((split.train, classes), (split.test, others)))
                raise DataError(f"{self.root}: {ours}, {theirs}; the same are needed")
            test_x, test_y = self._read(others)
            files += _names_and_sizes(split.test, others)
        else:
            x, y, order = train_x, train_y, torch.randperm(len(train_x), generator=generator(0))
            cut = max(1, round(len(x) * self.test_fraction))
            train_x, train_y, test_x, test_y = x[order[cut:]], y[order[cut:]], x[order[:cut]], y[order[:cut]]
        mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        return Dataset(
            train_inputs=(train_x - mean) / std,
            train_labels=train_y,
            test_inputs=(test_x - mean) / std,
            test_labels=test_y,
            classes=tuple(classes),
            files=hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest(),
            note=split.note,
        )

    def _read(self, classes: dict[str, list[Path]]) -> tuple[torch.Tensor, torch.Tensor]:
        from torchvision import transforms

        steps = [transforms.Resize(self.image_size), transforms.CenterCrop(self.image_size), transforms.ToTensor()]
        ready = transforms.Compose(steps)
        files = [(file, label) for label, some in enumerate(classes.values()) for file in some]
        pictures = [ready(open_picture(file, self.channels)) for file, _ in track(files, "reading pictures")]
        return torch.stack(pictures).float(), torch.tensor([label for _, label in files], dtype=torch.int64)


def _names_and_sizes(folder: Path, classes: dict[str, list[Path]]) -> str:
    return "".join(f"{file.relative_to(folder)} {file.stat().st_size}\n" for files in classes.values() for file in files)


@dataclass(frozen=True, kw_only=True)
class ImportedData:
    """Data from the user's own code.

    Attributes:
        import_: "package.module:function" that returns a `torchopt.data.Dataset`; the key in a recipe is `import`.
        args: keyword arguments of that function.
    """

    import_: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Dataset:
        """Call the function and return its data.

        Raises:
            DataError: it returns something else, or raises.
        """
        function = load_callable(self.import_, where="data.import")
        with in_users_code(f"data.import: {self.import_}", DataError, function):
            found = function(**self.args)
        if not isinstance(found, Dataset):
            raise DataError(f"data.import: {self.import_} returned {type(found).__name__}; a torchopt.data.Dataset is needed")
        return found


def read_idx(path: Path) -> np.ndarray:
    """Read a gzip-compressed IDX file of bytes (the format of MNIST).

    Raises:
        FileError: missing, truncated or another format.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read as gzip-compressed IDX ({error}); copy the file again") from error


def spectrogram(audio: torch.Tensor, *, rate: int = 8000, bands: int = 32, frames: int = 32) -> torch.Tensor:
    """Return log power in `bands` mel bands over `frames` windows of the first second, (bands, frames).

    Args:
        audio: float32 (samples,) in [-1, 1]; shorter clips are padded with silence.
        rate: samples a second.
        bands: number of mel-spaced bands up to rate / 2.
        frames: number of windows.

    Example:
        >>> spectrogram(torch.zeros(100)).shape
        torch.Size([32, 32])
    """
    clip = torch.zeros(rate, dtype=torch.float32)
    clip[: min(rate, len(audio))] = audio[:rate]
    window = 512
    hop = (rate - window) // (frames - 1)
    spectrum = (
        torch.stft(
            clip, window, hop, window=torch.hann_window(window, dtype=torch.float32), center=False, return_complex=True
        ).abs()
        ** 2
    )
    edges = 700 * (
        10 ** (torch.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bands + 2, dtype=torch.float32) / 2595) - 1
    )  # mel scale, Hz
    hertz = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float32)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp_min(0)  # (bands, window / 2 + 1)
    return torch.log(triangles @ spectrum[:, :frames] + 1e-6)


def _folder(root: str | None, below: tuple[str, ...], needed: str, what: str) -> Path:
    """The first folder that holds the file `needed`: in `root`, else in $TORCHOPT_DATA, else in ../shared/data."""
    if root is not None:
        places = [Path(root), *(Path(root) / name for name in below)]
    else:
        roots = [os.environ.get("TORCHOPT_DATA"), "../shared/data"]
        places = [Path(r) / name for r in roots if r for name in below]
    for place in places:
        if (place / needed).is_file():
            return place
    where = root if root is not None else f"$TORCHOPT_DATA/{below[0]}"
    raise FileError(f"{where}: {needed} is not there; put the files of {what} there, or set data.root or $TORCHOPT_DATA")


def _dataset(train_x: Any, train_y: Any, test_x: Any, test_y: Any, classes: tuple[str, ...]) -> Dataset:
    return Dataset(
        train_inputs=torch.from_numpy(np.ascontiguousarray(train_x)),
        train_labels=torch.from_numpy(train_y.astype(np.int64)),
        test_inputs=torch.from_numpy(np.ascontiguousarray(test_x)),
        test_labels=torch.from_numpy(test_y.astype(np.int64)),
        classes=classes,
    )
