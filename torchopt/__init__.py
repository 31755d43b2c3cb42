"""torchopt: prune, cluster and quantize PyTorch models, and export one small ONNX file that ONNX Runtime runs fast.

What is named here is imported when it is asked for (`io/lazy.py`), so that `import torchopt` and the command line's help load no torch.
"""

from typing import TYPE_CHECKING

from torchopt.errors import (
    ConfigError,
    DataError,
    FileError,
    ModelError,
    RuleError,
    StateError,
    TargetError,
    TorchoptError,
)
from torchopt.io.lazy import lazy

if TYPE_CHECKING:
    from torchopt.c_code import CVerdict, verify_c
    from torchopt.cluster import Cluster
    from torchopt.compress.checkpoint import load, save
    from torchopt.compress.one_shot import one_shot
    from torchopt.compress.shrink import shrink
    from torchopt.compress.verbs import calibrate, finalize, prepare, step
    from torchopt.export import ExportResult, PackReport, export, unpack
    from torchopt.from_torch_ao import from_torch_ao
    from torchopt.network.batch_norm import reestimate_batch_norm
    from torchopt.onnx_to_onnx import CompressedFile, Likeness, compress_onnx
    from torchopt.pack import pack
    from torchopt.prune import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay, Prune
    from torchopt.quantize import Quantize, load_ranges, save_ranges
    from torchopt.report import Report, report
    from torchopt.rules import Rule
    from torchopt.runtime import Placement, Timing, Verdict, benchmark, inspect, verify
    from torchopt.search.choices import Choices
    from torchopt.search.layers.table import Sensitivity
    from torchopt.search.result import SearchResult
    from torchopt.search.search import search
    from torchopt.search.sensitivity import sensitivity
    from torchopt.state.moving_average import ema_multi_avg_fn

lazy(
    __name__,
    {
        "torchopt.c_code": ("CVerdict", "verify_c"),
        "torchopt.cluster": ("Cluster",),
        "torchopt.compress.checkpoint": ("load", "save"),
        "torchopt.compress.one_shot": ("one_shot",),
        "torchopt.compress.shrink": ("shrink",),
        "torchopt.compress.verbs": ("calibrate", "finalize", "prepare", "step"),
        "torchopt.export": ("ExportResult", "PackReport", "export", "unpack"),
        "torchopt.from_torch_ao": ("from_torch_ao",),
        "torchopt.network.batch_norm": ("reestimate_batch_norm",),
        "torchopt.onnx_to_onnx": ("CompressedFile", "Likeness", "compress_onnx"),
        "torchopt.pack": ("pack",),
        "torchopt.prune": ("ConstantSparsity", "CosineDecay", "MultiStep", "PolynomialDecay", "Prune"),
        "torchopt.quantize": ("Quantize", "load_ranges", "save_ranges"),
        "torchopt.report": ("Report", "report"),
        "torchopt.rules": ("Rule",),
        "torchopt.runtime": ("Placement", "Timing", "Verdict", "benchmark", "inspect", "verify"),
        "torchopt.search.choices": ("Choices",),
        "torchopt.search.result": ("SearchResult",),
        "torchopt.search.search": ("search",),
        "torchopt.search.sensitivity": ("sensitivity",),
        "torchopt.search.layers.table": ("Sensitivity",),
        "torchopt.state.moving_average": ("ema_multi_avg_fn",),
    },
)

__version__ = "0.1.0"

__all__ = [
    "CVerdict",
    "Choices",
    "Cluster",
    "CompressedFile",
    "ConfigError",
    "ConstantSparsity",
    "CosineDecay",
    "DataError",
    "ExportResult",
    "FileError",
    "Likeness",
    "ModelError",
    "MultiStep",
    "PackReport",
    "Placement",
    "PolynomialDecay",
    "Prune",
    "Quantize",
    "Report",
    "Rule",
    "RuleError",
    "SearchResult",
    "Sensitivity",
    "StateError",
    "TargetError",
    "Timing",
    "TorchoptError",
    "Verdict",
    "benchmark",
    "calibrate",
    "compress_onnx",
    "ema_multi_avg_fn",
    "export",
    "finalize",
    "from_torch_ao",
    "inspect",
    "load",
    "load_ranges",
    "one_shot",
    "pack",
    "prepare",
    "reestimate_batch_norm",
    "report",
    "save",
    "save_ranges",
    "search",
    "sensitivity",
    "shrink",
    "step",
    "unpack",
    "verify",
    "verify_c",
]
