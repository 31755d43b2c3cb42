"""Reference networks by name, or anyone's own by import: what stands under `model:` in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchopt.errors import ConfigError, FileError, ModelError, nearest
from torchopt.io.importing import in_users_code, load_callable
from torchopt.models.networks import DigitsNet, DsCnn, MobileNet, ResNet8

KINDS: dict[str, type[ResNet8 | DigitsNet | DsCnn | MobileNet]] = {
    "resnet8": ResNet8,
    "digits_net": DigitsNet,
    "ds_cnn": DsCnn,
    "mobile_net": MobileNet,
}
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where trainers put the weights in their checkpoints
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before every name


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """One of torchopt's own networks.

    Attributes:
        kind: "resnet8", "digits_net", "ds_cnn" or "mobile_net".
        classes: number of outputs, at least 2.
        in_channels: channels of the input pictures.
        width: multiplies the numbers of channels.
        weights: a file with a `state_dict` to start from, or None.
    """

    kind: str
    classes: int
    in_channels: int = 1
    width: float = 1.0
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"model.kind: {self.kind!r} is not one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}")
        if self.classes < 2:
            raise ConfigError(f"model.classes: got {self.classes}; at least 2 is needed")
        if self.in_channels < 1:
            raise ConfigError(f"model.in_channels: got {self.in_channels}; at least 1 is needed")
        if not 0.1 <= self.width <= 16:
            raise ConfigError(f"model.width: got {self.width}; a number between 0.1 and 16 is needed")

    def build(self) -> nn.Module:
        """Return the network, freshly initialized from torch's global random state, or with `weights` loaded."""
        try:
            network = KINDS[self.kind](self.classes, self.in_channels, self.width)
        except (RuntimeError, MemoryError) as error:  # torch finds no memory for it
            raise ModelError(
                f"model: {self.kind} cannot be built: {str(error).splitlines()[0]}; a smaller one is needed"
            ) from error
        return _with_weights(network, self.weights)


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A network from the user's own code.

    Attributes:
        import_: "package.module:function" that returns an `nn.Module`; the key in a recipe is `import`.
        args: keyword arguments of that function.
        weights: a file with a `state_dict` to start from, or None.
    """

    import_: str
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def build(self) -> nn.Module:
        """Call the function and return its network.

        Raises:
            ModelError: it returns something else, or raises.
        """
        function = load_callable(self.import_, where="model.import")
        with in_users_code(f"model.import: {self.import_}", ModelError, function):
            network = function(**self.args)
        if not isinstance(network, nn.Module):
            raise ModelError(f"model.import: {self.import_} returned {type(network).__name__}; a torch.nn.Module is needed")
        return _with_weights(network, self.weights)


def build(kind: str, classes: int, in_channels: int = 1, width: float = 1.0) -> nn.Module:
    """Return a reference network.

    Args:
        kind: "resnet8", "digits_net", "ds_cnn" or "mobile_net".
        classes: number of outputs.
        in_channels: channels of the input pictures.
        width: multiplies the numbers of channels.

    Raises:
        ConfigError: an unknown kind or a number out of range.

    Example:
        >>> net = build("resnet8", classes=10, in_channels=3)
        >>> sum(p.numel() for p in net.parameters() if p.dim() > 1)
        77360
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return ReferenceModel(kind=kind, classes=classes, in_channels=in_channels, width=width).build()


def load_weights(path: str) -> dict[str, torch.Tensor]:
    """Return the `state_dict` in a `.pt`/`.pth` file, or in a `.safetensors` file; no pickled code is run.

    It may stand in a trainer's checkpoint.

    Raises:
        FileError: no such file, or it holds something else.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file; the path of saved weights is needed") from error
    except Exception as error:
        raise FileError(
            f"{path}: not a file of weights ({type(error).__name__}); save one with torch.save(model.state_dict())"
        ) from error
    inner = [state[key] for key in NESTED if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)]
    state = inner[0] if inner else state
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise FileError(f"{path}: holds no state_dict; save one with torch.save(model.state_dict(), path)")
    return dict(state)


def _bare(state: Mapping[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """The same without what stands before every name, where the network has no such names."""
    found = dict(state)
    while found and not names & found.keys():
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _with_weights(network: nn.Module, path: str | None) -> nn.Module:
    if path is None:
        return network
    try:
        network.load_state_dict(_bare(load_weights(path), set(network.state_dict())), strict=True)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ModelError(f"{path}: the weights do not fit {type(network).__name__}: {first}") from error
    return network
