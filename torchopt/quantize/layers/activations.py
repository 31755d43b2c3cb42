"""The quantizer of activations that trains and observes; the one that a finalized model keeps is `rounding.py`'s.

    x̂ = s · (clamp(round(x / s) + z, q_min, q_max) − z)        s = (hi − lo) / (q_max − q_min)

with lo ≤ 0 ≤ hi, so that zero (and with it the padding of convolutions) is exact; after a ReLU lo = 0 gives z = q_min. Gradients pass
straight through inside the range (Jacob et al. 2018, arXiv:1712.05877). A scale that is trained is `learned.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchopt.errors import DataError, StateError
from torchopt.quantize.layers.kernels import Affine, affine_of
from torchopt.quantize.layers.rounding import fake_quantize, in_memory_order
from torchopt.quantize.observers import make
from torchopt.quantize.torch_ao import FakeQuantizeBase

TRAINING_MOMENTUM = 0.01  # torch.ao's averaging constant: ranges follow about the last hundred steps
START = 10  # batches whose extremes are joined first: the average would keep the first batch's range, short by its few samples
APART = 0.01  # of the scale: averages of ends and scale drift apart by their roundings, and no further
TORCHS_SMALLEST = 6.2e-5  # its operator gives no scale below 6.1e-5: small activations, and 16 bits, would lose their last bits
SMALLEST_SCALE = 2.0**-24  # keeps bias / (s_x · s_w) inside int32 for constant activations


def scale_and_zero_point(
    low: torch.Tensor, high: torch.Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 scale and the int32 zero point that cover [low, high] and zero.

    Example:
        >>> s, z = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(4.1), 0, 255, False)
        >>> round(float(s), 6), int(z)
        (0.02, 50)
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        middle = (quant_min + quant_max + 1) // 2
        scale = torch.maximum(-low / (middle - quant_min), high / (quant_max - middle)).clamp(min=SMALLEST_SCALE)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


class ActivationQuantizer(FakeQuantizeBase):
    """Observes an activation and rounds it to an integer grid, in one module with state of fixed shape.

    Args:
        quant_min: the smallest integer.
        quant_max: the largest.
        symmetric: zero in the middle of the grid.
        observer: what calibration uses, as `Quantize.observer` holds it.
        fixed_range: (low, high) known beforehand, such as (0, 1) after a sigmoid; then nothing is observed.

    In training mode it follows the data while `observer_enabled`, by a moving average or by the user's own observer, and rounds while
    `fake_quant_enabled`. The average starts from the union of the first ten batches' ranges, or from calibration. In evaluation it
    rounds on the range it has. Before it has seen any data it lets the activation pass.
    """

    min_val: torch.Tensor
    max_val: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    batches: torch.Tensor
    aside = False  # True while `rounding` is set for a while and not by the buffer
    learn = False  # no scale that is trained
    milestones: Sequence[int] | None = None  # of the layer that it serves

    def __init__(
        self,
        *,
        quant_min: int = 0,
        quant_max: int = 255,
        symmetric: bool = False,
        observer: Any = "moving_average",
        fixed_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.symmetric = quant_min, quant_max, symmetric
        self.dtype = torch.quint8 if quant_min >= 0 else torch.qint8  # what torch.ao matches against its backend
        self.is_dynamic = False
        self.observer = make(observer, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric)
        self.widening = observer == "minmax"
        self.by_output = observer == "auto" and fixed_range is None
        self.fixed = fixed_range is not None
        self.calibrating = False
        self.register_buffer("min_val", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(-torch.inf, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("batches", torch.tensor(0))
        self._hold_scale()
        self._mirror()
        if fixed_range is not None:
            low, high = (torch.tensor(float(end), dtype=torch.float32) for end in fixed_range)
            self.set_range(low, high)
            self.disable_observer()

    def _hold_scale(self) -> None:
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))

    @property
    def calibrated(self) -> bool:
        """True once a range is known."""
        return bool(self.min_val <= self.max_val)

    def _mirror(self) -> None:
        """Copy the flags into plain attributes, so that forward does not read tensors (a wait on a GPU, a break in a graph)."""
        self.ready = self.calibrated
        self.observing = bool(self.observer_enabled) and not self.fixed
        self.rounding = bool(self.fake_quant_enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Follow the data in training mode, or stop."""
        super().enable_observer(enabled and not self.fixed)
        self._mirror()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round, or let pass."""
        super().enable_fake_quant(enabled)
        self._mirror()

    def train(self, mode: bool = True) -> ActivationQuantizer:
        """Set the mode; in evaluation flags and zero point are those of the buffers, which an average or a copy may have written."""
        super().train(mode)
        if not self.aside:
            self._mirror()
        if not mode:
            self.settle()
        return self

    @property
    def agrees(self) -> bool:
        """True unless the scale in use is another than the range asks for: by more than an average of ranges makes of it."""
        if self.learn or self.fixed or self.symmetric or not (self.calibrated and bool(self.fake_quant_enabled)):
            return True
        scale, _ = self._of_range()
        return bool((self.scale[0] - scale).abs() <= APART * scale)

    def settle(self) -> None:
        """Take the zero point of the range where another stands, such as that of a newer range beside averaged ends."""
        if self.learn or self.fixed or not self.calibrated or not self.agrees:
            return
        scale, zero_point = self._of_range()
        if bool((self.scale[0] - scale).abs() > APART * scale) or int((self.zero_point[0] - zero_point).abs()) > 1:
            self._set_scale()

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Represent [low, high] from now on, known from data: an average that follows starts here.

        Raises:
            DataError: the range is not finite.
        """
        self.represent(low, high)
        self.batches.fill_(START)

    def represent(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Represent [low, high], however many batches an average has seen.

        Raises:
            DataError: the range is not finite.
        """
        if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
            raise DataError(f"calibrate: an activation ranges over [{float(low)}, {float(high)}]; finite data is needed")
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        self._set_scale()
        self.ready = True

    def _of_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return scale_and_zero_point(self.min_val, self.max_val, self.quant_min, self.quant_max, self.symmetric)

    def _set_scale(self) -> None:
        scale, zero_point = self._of_range()
        with torch.no_grad():
            self.scale.copy_(scale.reshape(1))
            self.zero_point.copy_(zero_point.reshape(1))

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return scale and zero point, each of shape (1,)."""
        return self.scale.detach(), self.zero_point

    def affine(self) -> Affine | None:
        """Return the grid as evaluation uses it; None while it is not known or not used, or wider than integer kernels take."""
        if self.training or self.calibrating or not (self.ready and self.rounding):
            return None
        return affine_of(self.scale.detach().clamp(min=SMALLEST_SCALE), self.zero_point, self.quant_min, self.quant_max)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe where asked, then round where asked; x of any shape, float."""
        if self.scale.dtype != torch.float32:
            raise StateError(
                f"a quantizer's ranges are {self.scale.dtype}: the prepared model was converted, and integer grids are float32; call "
                "model.float(), and train under torch.autocast where half precision is wanted"
            )
        x = x.float()  # grids are float32, also under autocast
        if self.calibrating:
            self.observer.observe(x.detach() if self.observer.whole else in_memory_order(x.detach()))
            return x
        if self._follows():
            return self._follow(x)
        if not (self.ready or self.training or torch.compiler.is_compiling()):
            self._mirror()  # a copy made before the first batch has its range written into it
        return self._rounded(x) if self.ready and self.rounding else x

    def _follows(self) -> bool:
        """True where this call moves the range."""
        return self.training and self.observing

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def _follow(self, x: torch.Tensor) -> torch.Tensor:
        """One training step of the range, and the rounding on it."""
        self.ready = True
        if self.observer.whole:
            self.observer.observe(x.detach())
            self.set_range(*self.observer.range())
            return fake_quantize(x, self.scale.detach(), self.zero_point, self.quant_min, self.quant_max) if self.rounding else x
        low, high = torch.aminmax(in_memory_order(x.detach()))
        if self.widening:
            self.min_val.copy_(torch.minimum(self.min_val, low))
            self.max_val.copy_(torch.maximum(self.max_val, high))
            self._set_scale()
        else:
            self._average(torch.stack((low, high)))
        return fake_quantize(x, self.scale.detach(), self.zero_point, self.quant_min, self.quant_max) if self.rounding else x

    def _average(self, ends: torch.Tensor) -> None:
        """Move the range towards the `ends` of this batch, (2,); torch's fused operator, which sees no more of it.

        While the average starts, the range is widened first, and what it moves towards is the range itself.
        """
        starts = self.batches < START
        self.batches.add_(starts)
        reach = torch.stack((self.min_val, self.max_val))
        reach = torch.where(starts, torch.stack((torch.minimum(reach[0], ends[0]), torch.maximum(reach[1], ends[1]))), reach)
        ends = torch.where(starts, reach, ends)
        self.min_val.copy_(reach[0])
        self.max_val.copy_(reach[1])
        torch.fused_moving_avg_obs_fake_quant(
            ends,
            self.observer_enabled,
            self.fake_quant_enabled,
            self.min_val,
            self.max_val,
            self.scale,
            self.zero_point,
            TRAINING_MOMENTUM,
            self.quant_min,
            self.quant_max,
            -1,
            False,
            self.symmetric,
        )
        wide = self.quant_max - self.quant_min > 255
        if wide or ends.device.type != "cpu" or float(self.scale) <= TORCHS_SMALLEST:  # else a read, which a GPU would wait for
            self._set_scale()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        low = state_dict.get(prefix + "min_val")
        if low is not None:  # a checkpoint of the time when the average started from the first batch
            state_dict.setdefault(prefix + "batches", torch.tensor(START if bool(torch.isfinite(low)) else 0))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mirror()

    def extra_repr(self) -> str:
        """Grid and range."""
        return f"{self.quant_min}…{self.quant_max}, range [{float(self.min_val):.4g}, {float(self.max_val):.4g}]"
