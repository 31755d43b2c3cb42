"""Every operator that has a form in C, by its name in ONNX Runtime's graph."""

from torchopt.c_code.lower import Operator
from torchopt.c_code.operators import floats, integers, products, shapes, windows

OPERATORS: dict[str, Operator] = {
    **products.OPERATORS,
    **integers.OPERATORS,
    **windows.OPERATORS,
    **shapes.OPERATORS,
    **floats.OPERATORS,
}

__all__ = ["OPERATORS"]
