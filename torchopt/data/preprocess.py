"""What is done to a picture before a network sees it: said by the user, shown to the user, and nothing besides.

    x = (crop(resize(picture)) / 255 − mean) / std

Every network was trained on one choice of these. A wrong one costs accuracy and raises no error, so there is no default: four options,
a preset, or the transform that belongs to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchopt.data.pictures import open_picture
from torchopt.errors import ConfigError, DataError
from torchopt.io.importing import in_users_code, load_callable

Sizes = tuple[int, int]
SHOWN = 300  # letters of a transform's own description


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From a picture to (C, H, W) float32.

    Attributes:
        resize: the short side in pixels, or (height, width); None leaves the size.
        crop: (height, width) cut from the middle; None cuts nothing.
        mean: of pixels in [0, 1], one number or one a channel; None subtracts nothing.
        std: likewise, what is divided by.
        transform: a function of a PIL picture that does all of this instead.
        name: of that function.

    Example:
        >>> print(PRESETS["imagenet"])
        short side to 256, middle 224×224, pixels / 255, minus 0.485, 0.456, 0.406, over 0.229, 0.224, 0.225
    """

    resize: int | Sizes | None = None
    crop: Sizes | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    transform: Callable[[Any], Any] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            given, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise ConfigError(f"--{given}: is given without --{other}; both are needed, of pixels in [0, 1]")
        if self.mean is not None and self.std is not None:
            if max(map(abs, self.mean)) > 1 or not all(0 < value <= 1 for value in self.std):
                raise ConfigError(f"--mean {_row(self.mean)} --std {_row(self.std)}: are of pixels in [0, 1]; divide them by 255")
            if len(self.mean) != len(self.std):
                raise ConfigError(f"--mean has {len(self.mean)} numbers, --std {len(self.std)}; as many are needed")

    def __str__(self) -> str:
        if self.transform is not None:
            said = " ".join(str(self.transform).split())
            return self.name if said.startswith("<") else f"{self.name}: {said[:SHOWN]}"
        short = isinstance(self.resize, int)
        parts = [] if self.resize is None else [f"short side to {self.resize}" if short else f"resized to {_by(self.resize)}"]
        parts += [] if self.crop is None else [f"middle {_by(self.crop)}"]
        parts += ["pixels / 255"]
        parts += [] if self.mean is None or self.std is None else [f"minus {_row(self.mean)}", f"over {_row(self.std)}"]
        return ", ".join(parts)

    def fitted(self, sizes: Sizes | None) -> Preprocess:
        """Return the same for pictures of (height, width), where no size was said: short side to the longer one, middle cut out."""
        if sizes is None or self.transform is not None or self.resize is not None or self.crop is not None:
            return self
        return replace(self, resize=max(sizes), crop=sizes)

    def __call__(self, path: Path, channels: int) -> torch.Tensor:
        """Return a picture as (C, H, W) float32.

        Raises:
            FileError: it cannot be read.
            DataError: the transform returns no tensor of three dimensions, or mean and std have another number of channels.
        """
        picture = open_picture(path, channels)
        if self.transform is not None:
            with in_users_code(f"--preprocess {self.name}: {path}", DataError, self.transform):
                made = self.transform(picture)
            if not isinstance(made, torch.Tensor) or made.dim() != 3:
                found = f"shape {tuple(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
                raise DataError(f"--preprocess {self.name}: made {found} of a picture; a tensor (C, H, W) is needed")
            return made.float()
        return self._standard(picture, channels)

    def _standard(self, picture: Any, channels: int) -> torch.Tensor:
        from torchvision.transforms import v2

        if self.resize is not None:
            picture = v2.functional.resize(picture, [self.resize] if isinstance(self.resize, int) else list(self.resize))
        if self.crop is not None:
            picture = v2.functional.center_crop(picture, list(self.crop))
        pixels = np.asarray(picture, np.float32) / 255
        x = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
        if self.mean is None or self.std is None:
            return x
        if len(self.mean) not in (1, channels):
            raise DataError(
                f"--mean: has {len(self.mean)} numbers, and the network takes {channels} channels; give 1 or {channels}"
            )
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


PRESETS = {
    "imagenet": Preprocess(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "pixels": Preprocess(),
}


def named(text: str, model: nn.Module) -> Preprocess:
    """Return what `--preprocess` names.

    Args:
        text: "imagenet"; "pixels", which only divides by 255; "weights:NAME" of torchvision; "timm", the model's own data
            config; a folder with a Hugging Face processor; or "module:function" of a PIL picture.
        model: the network, for "timm".

    Raises:
        ConfigError: it is none of these, or cannot be loaded.
    """
    if text in PRESETS:
        return PRESETS[text]
    where = f"--preprocess {text}"
    if text.startswith("weights:"):
        from torchvision.models import get_weight

        with in_users_code(where, ConfigError):
            transform = get_weight(text.removeprefix("weights:")).transforms()
    elif text == "timm":
        transform = _timm(model, where)
    elif Path(text).is_dir():
        transform = _processor(text, where)
    elif ":" in text:
        transform = load_callable(text, where="--preprocess")
    else:
        raise ConfigError(
            f"--preprocess: got {text!r}; imagenet, pixels, weights:NAME, timm, the folder of a processor, or module:function is needed"
        )
    return Preprocess(transform=transform, name=text)


def _timm(model: nn.Module, where: str) -> Callable[[Any], Any]:
    if not hasattr(model, "pretrained_cfg"):
        raise ConfigError(f"{where}: {type(model).__name__} is no network of timm's; name another preprocessing")
    with in_users_code(where, ConfigError):
        import timm.data

        made: Callable[[Any], Any] = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return made


def _processor(folder: str, where: str) -> Callable[[Any], Any]:
    with in_users_code(where, ConfigError):
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def processed(picture: Any) -> Any:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    return processed


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read `0.485,0.456,0.406`.

    Raises:
        ConfigError: another spelling.
    """
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
        if not np.isfinite(found).all():
            raise ValueError(text)
    except ValueError:
        raise ConfigError(f"{option}: got {text!r}; numbers such as 0.485,0.456,0.406 are needed") from None
    return found


def pixels(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read `256` or `240,320`.

    Raises:
        ConfigError: another spelling.
    """
    parts = [] if text is None else text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option}: got {text!r}; pixels are needed, 256 or HEIGHT,WIDTH")
    return tuple(map(int, parts)) or None


def asked(
    model: nn.Module,
    *,
    preset: str | None,
    mean: str | None,
    std: str | None,
    resize: str | None,
    crop: str | None,
) -> Preprocess | None:
    """Return what the options of a command say, or None where they say nothing.

    Raises:
        ConfigError: they contradict one another, or are spelled otherwise.
    """
    given = {"--mean": mean, "--std": std, "--resize": resize, "--crop": crop}
    said = [option for option, value in given.items() if value is not None]
    if preset is not None and said:
        raise ConfigError(f"{said[0]}: cannot be used with --preprocess {preset}, which says it already; give one of the two")
    if preset is not None:
        return named(preset, model)
    if not said:
        return None
    sides, cut = pixels("--resize", resize), pixels("--crop", crop)
    return Preprocess(
        resize=None if sides is None else sides[0] if len(sides) == 1 else (sides[0], sides[1]),
        crop=None if cut is None else (cut[0], cut[-1]),
        mean=numbers("--mean", mean),
        std=numbers("--std", std),
    )


def _row(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _by(sizes: int | Sequence[int]) -> str:
    return "×".join(map(str, [sizes] if isinstance(sizes, int) else sizes))
