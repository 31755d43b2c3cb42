"""ONNX Runtime: opening files, what it really runs, how fast, and proof that it computes what torch does."""

from torchopt.runtime.benchmark import Timing, benchmark
from torchopt.runtime.inputs import InputShape, parse_inputs
from torchopt.runtime.inspect import Placement, inspect
from torchopt.runtime.session import session
from torchopt.runtime.verify import Verdict, verify

__all__ = ["InputShape", "Placement", "Timing", "Verdict", "benchmark", "inspect", "parse_inputs", "session", "verify"]
