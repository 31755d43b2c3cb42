"""Inputs without labels, for calibration: a folder of pictures of any depth, or an array in a `.npy` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from torchopt.data.pictures import PICTURES, open_picture, picture_files
from torchopt.errors import ConfigError, DataError, FileError
from torchopt.io.progress import track

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation that torchvision's networks expect


def read_inputs(
    path: str | Path,
    *,
    size: tuple[int, int, int],
    samples: int = 256,
    normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET,
) -> torch.Tensor:
    """Return up to `samples` inputs, float32 (N, C, H, W).

    Args:
        path: a folder of pictures (also in folders below it), or a `.npy` file that holds (N, C, H, W), taken as it is.
        size: (C, H, W) of the network's input; pictures are resized to the short side, then cropped in the middle.
        samples: how many at most, spread evenly over the files in the order of their names.
        normalize: mean and standard deviation a channel, of pixels in [0, 1].

    Raises:
        FileError: no such path, or a file that cannot be read.
        DataError: no pictures, or an array of another shape.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.npy"
        >>> np.save(file, np.zeros((3, 1, 4, 4), np.float32))
        >>> read_inputs(file, size=(1, 4, 4)).shape
        torch.Size([3, 1, 4, 4])
    """
    path = Path(path)
    if path.suffix == ".npy":
        return _array(path, size)[:samples]
    if not path.is_dir():
        raise FileError(f"{path}: no such folder; a folder of pictures, or an array in a .npy file, is needed")
    if size[0] not in (1, 3):
        raise ConfigError(
            f"{path}: pictures have 1 channel (grey) or 3, and inputs of shape {size} are asked for; give a .npy file"
        )
    files = picture_files(path)
    if not files:
        raise DataError(f"{path}: holds no pictures ({', '.join(sorted(PICTURES))}); at least one is needed")
    chosen = [files[i * len(files) // samples] for i in range(samples)] if len(files) > samples else files
    return torch.stack([_picture(file, size, normalize) for file in track(chosen, "reading pictures")])


def _array(path: Path, size: tuple[int, int, int]) -> torch.Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FileError(f"{path}: cannot be read as an array ({error}); save one with numpy.save") from error
    if not (isinstance(found, np.ndarray) and found.dtype.kind in "fiub"):
        raise DataError(f"{path}: holds {getattr(found, 'dtype', 'several arrays')}; one array of numbers is needed")
    if found.ndim != 4 or found.shape[1:] != size or len(found) == 0:
        raise DataError(f"{path}: holds an array of shape {found.shape}; (N, {', '.join(map(str, size))}) is needed")
    return torch.from_numpy(found.astype(np.float32))


def _picture(path: Path, size: tuple[int, int, int], normalize: tuple[Sequence[float], Sequence[float]]) -> torch.Tensor:
    from torchvision.transforms import v2

    channels, height, width = size
    picture = open_picture(path, channels)
    cropped = v2.functional.center_crop(v2.functional.resize(picture, [max(height, width)]), [height, width])
    pixels = torch.from_numpy(np.asarray(cropped, np.float32) / 255).reshape(height, width, channels).permute(2, 0, 1)
    mean, std = (torch.tensor(list(values)[:channels], dtype=torch.float32)[:, None, None] for values in normalize)
    return (pixels - mean) / std
