"""C code for microcontrollers: a network as one header and one C99 file, and the proof that it gives ONNX Runtime's integers."""

from torchopt.c_code.export import CExport, export_c
from torchopt.c_code.verify import CVerdict, MachineVerdict, verify_c

__all__ = ["CExport", "CVerdict", "MachineVerdict", "export_c", "verify_c"]
