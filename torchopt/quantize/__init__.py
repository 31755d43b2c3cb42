"""Quantization: integer grids for weights and activations, for training and after it."""

from torchopt.quantize.attach import attach
from torchopt.quantize.bake import bake
from torchopt.quantize.calibration.cache import load_ranges, save_ranges
from torchopt.quantize.calibration.calibrate import calibrate, observes, synchronize
from torchopt.quantize.calibration.proving import unrounded as unrounded_all
from torchopt.quantize.calibration.sensitivity import harms
from torchopt.quantize.config import Quantize
from torchopt.quantize.corrections.table_scales import (
    add_to_mean,
    channel_factors,
    hold_integers,
    scales_channels,
    turn_channels,
)
from torchopt.quantize.graph.functional import beside
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.attention import can_open, open_attentions
from torchopt.quantize.layers.dynamic import DynamicLinear
from torchopt.quantize.layers.input_rounded import Rounded
from torchopt.quantize.layers.kernels import IntegerKernel, link_kernels
from torchopt.quantize.layers.read_elsewhere import round_for_readers, stop_rounding
from torchopt.quantize.layers.rounding import FixedQuantize
from torchopt.quantize.milestones import unrounded, update
from torchopt.quantize.observers.own import ImportedObserver, OwnObserver
from torchopt.quantize.record import Record, decide_as, decide_scales, decisions

__all__ = [
    "ActivationQuantizer",
    "DynamicLinear",
    "FixedQuantize",
    "ImportedObserver",
    "IntegerKernel",
    "OwnObserver",
    "Quantize",
    "Record",
    "Rounded",
    "add_to_mean",
    "attach",
    "bake",
    "beside",
    "calibrate",
    "can_open",
    "channel_factors",
    "decide_as",
    "decide_scales",
    "decisions",
    "harms",
    "hold_integers",
    "link_kernels",
    "load_ranges",
    "observes",
    "open_attentions",
    "round_for_readers",
    "save_ranges",
    "scales_channels",
    "stop_rounding",
    "synchronize",
    "turn_channels",
    "unrounded",
    "unrounded_all",
    "update",
]
