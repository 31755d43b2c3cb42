"""From steps to text: one header and one C99 file. Functions stand in `templates/`, only those that the network calls are written.

A template is C with the type T in it; what stands below its line "for each type T" is written once for each type in use, with names that
end in _u8, _s8 or _f32. Each step has one constant structure and is one call in `<name>_run`. Constants are `static const`: they lie in
flash. Nothing else but the arena is static, nothing is allocated.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from torchopt.c_code.arena import Arena, planned
from torchopt.c_code.program import C_TYPE, Program, Step, Value

MARK = re.compile(r"^/\* ==== for each type T ==== \*/\n", re.M)
SHARED = (
    "nearest",
    "requantized",
    "plus",
    "products",
)  # templates that others call, in the order in which they build on each other
TYPES = {"u8": "uint8_t", "s8": "int8_t", "f32": "float"}
WIDTH = 130
FORMS = ("CODES", "RUNS", "RUNS4")


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """What is written.

    Attributes:
        header: the .h file.
        source: the .c file.
        constant_bytes: of all constants: weights, tables, parameters.
        arena: where values lie.
        fingerprint: the source's checksum, which the header names.
    """

    header: str
    source: str
    constant_bytes: int
    arena: Arena
    fingerprint: str


def written(program: Program, name: str, comment: str) -> Text:
    """Return the C of a program.

    Args:
        program: the steps.
        name: what the files and functions are called.
        comment: what the first lines say of where it comes from.
    """
    arena = planned(program)
    constants, size = _constants(program)
    functions = _functions(program)
    names = _parameters(program, functions + constants + name)
    signature = f"void {name}_run({_signature(program, names)})"
    body = _body(program, arena, names)
    upper = name.upper()
    used = {step.fields["weights"]["form"] for step in program.steps if isinstance(step.fields.get("weights"), dict)}
    flags = [f"#define USES_{form} {int(form in used)}" for form in FORMS] if used else []
    source = "\n".join(
        [
            f"/* {name}.c: {comment}",
            "   Every step gives the integers of ONNX Runtime's kernels: float32 ratios, halves to even. Nothing is allocated. */",
            f'#include "{name}.h"',
            "#include <float.h>\n#include <math.h>\n#include <string.h>\n",
            template("prelude"),
            *flags,
            "",
            functions,
            _trace(),
            constants,
            f"static union {{\n    double aligned;\n    uint8_t bytes[{upper}_ARENA_BYTES];\n}} arena;\n",
            signature + "\n{",
            *body,
            "}\n",
        ]
    )
    fingerprint = hashlib.sha256(source.encode()).hexdigest()[:16]
    header = _header(program, names, name, comment, signature, max(arena.size, 1), fingerprint)
    return Text(header=header, source=source, constant_bytes=size, arena=arena, fingerprint=fingerprint)


@functools.cache
def template(name: str) -> str:
    """Return a template's text."""
    return (resources.files("torchopt.c_code") / "templates" / f"{name}.c").read_text(encoding="utf-8")


def _functions(program: Program) -> str:
    """The functions that are called, and those that they call."""
    wanted: dict[str, set[str]] = {}
    for step in program.steps:
        wanted.setdefault(step.function, set()).add(step.dtype)
    for shared in reversed(SHARED):
        callers = [types for name, types in wanted.items() if re.search(rf"\b{shared}(_T)?\(", template(name))]
        if callers:
            wanted[shared] = set().union(*callers)
    order = [name for name in SHARED if name in wanted] + [name for name in wanted if name not in SHARED]
    return "\n".join(_instances(name, sorted(wanted[name])) for name in order)


def _instances(name: str, types: list[str]) -> str:
    text = template(name)
    if not MARK.search(text):
        return text
    once, each = MARK.split(text)
    return once + "".join(re.sub(r"\bT\b", TYPES[t], re.sub(r"_T\b", f"_{t}", each)) for t in types)


def _trace() -> str:
    return (
        "#ifdef TORCHOPT_TRACE /* for comparing each step with ONNX Runtime */\n"
        "extern void torchopt_trace(int step, const void *values, size_t bytes);\n"
        "#else\n#define torchopt_trace(step, values, bytes) ((void)0)\n#endif\n"
    )


def _constants(program: Program) -> tuple[str, int]:
    """The constants of all steps, and their bytes."""
    parts, size = [], 0
    seen: set[int] = set()
    for number, step in enumerate(program.steps):
        label = f"{step.function}_{number}"
        for value in step.inputs:
            if value.root.constant is not None and id(value.root) not in seen:
                seen.add(id(value.root))
                array = value.root.constant
                parts.append(_array(_constant_name(value.root, program), array))
                size += array.nbytes
        arrays: list[str] = []
        text, own = _structure(step.fields, label, arrays)
        parts += [f"/* {number}: {step.what}, {_shape(step.output)} */", *arrays]
        parts.append(f"static const struct {step.function} {label} = {text};\n")
        size += own
    return "\n".join(parts), size


def _structure(fields: dict[str, Any], label: str, arrays: list[str], depth: int = 1) -> tuple[str, int]:
    """The text of a structure and the bytes of it and of its arrays, whose texts are added to `arrays`."""
    size, pieces = 0, []
    for key, value in fields.items():
        if isinstance(value, np.ndarray):
            arrays.append(_array(f"{label}_{key}", value))
            size += value.nbytes + 4
            pieces.append(f".{key} = {label}_{key}")
        elif isinstance(value, dict):
            text, own = _structure(value, f"{label}_{key}", arrays, depth + 1)
            size += own
            pieces.append(f".{key} = {text}")
        elif isinstance(value, (list, tuple)):
            size += 4 * len(value)
            pieces.append(f".{key} = {{{', '.join(map(_number, value))}}}")
        else:
            size += 4
            pieces.append(f".{key} = {'0' if value is None else _number(value)}")
    if depth > 1:
        return "{" + ", ".join(pieces) + "}", size
    return "{\n" + _lines(pieces) + "\n}", size


def _lines(pieces: list[str]) -> str:
    """Comma-separated pieces in indented lines."""
    lines, line = [], "   "
    for piece in pieces:
        if len(line) + len(piece) + 2 > WIDTH and line.strip():
            lines.append(line)
            line = "   "
        line += f" {piece},"
    return "\n".join([*lines, line])


def _array(name: str, array: np.ndarray) -> str:
    flat = array.reshape(-1)
    kind = {"uint16": "uint16_t", **C_TYPE}[flat.dtype.name]
    return f"static const {kind} {name}[{flat.size}] = {{\n{_lines([_number(v) for v in flat.tolist()] if flat.dtype != np.float32 else [_number(v) for v in flat])}\n}};"  # noqa: E501


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if np.isinf(number):
            return "INFINITY" if number > 0 else "-INFINITY"
        text = f"{number:.9g}"
        return text + ("" if "." in text or "e" in text else ".0") + "f"
    return str(int(value)) if int(value) != -(2**31) else "(-2147483647 - 1)"


def _constant_name(value: Value, program: Program) -> str:
    roots: list[Value] = []
    for step in program.steps:
        for read in step.inputs:
            if read.root.constant is not None and read.root not in roots:
                roots.append(read.root)
    return f"constant_{roots.index(value)}"


def _parameters(program: Program, text: str) -> dict[int, str]:
    """The caller's names of inputs and outputs, none of which is a name in the file."""
    names = {}
    for value in [*program.inputs, *program.outputs]:
        name = str(value.root.outside)
        while re.search(rf"\b{name}\b", text) or name == "arena":
            name += "_"
        names[id(value.root)] = name
    return names


def _signature(program: Program, names: dict[int, str]) -> str:
    given = [f"const {C_TYPE[v.dtype]} *{names[id(v.root)]}" for v in program.inputs]
    return ", ".join([*given, *(f"{C_TYPE[v.dtype]} *{names[id(v.root)]}" for v in program.outputs)])


def _body(program: Program, arena: Arena, names: dict[int, str]) -> list[str]:
    def place(value: Value, *, const: bool) -> str:
        root = value.root
        if root.outside is not None:
            return names[id(root)]
        if root.constant is not None:
            return _constant_name(root, program)
        at = f"arena.bytes + {arena.offsets[id(root)]}"
        return at if value.dtype == "uint8" else f"({'const ' if const else ''}{C_TYPE[value.dtype]} *)({at})"

    last = {id(step.output): number for number, step in enumerate(program.steps)}
    lines = []
    for number, step in enumerate(program.steps):
        arguments = [f"&{step.function}_{number}", *(place(v, const=True) for v in step.inputs), place(step.output, const=False)]
        if step.function in ("conv", "linear_to_float"):
            arguments.append(f"arena.bytes + {arena.scratch[number]}" if step.scratch else "0")
        lines.append(f"    {step.function}_{step.dtype}({', '.join(arguments)});")
        if last[id(step.output)] == number:
            lines.append(f"    torchopt_trace({number}, {place(step.output, const=True)}, {step.output.size});")
    unused = [v for v in program.inputs if not any(v.root is r.root for step in program.steps for r in step.inputs)]
    return [f"    (void){names[id(v.root)]};" for v in unused] + lines


def _shape(value: Value) -> str:
    sizes = value.in_memory(np.empty(value.shape, np.void)).shape
    return f"{value.dtype} {' x '.join(map(str, sizes))}" + (" (channels last)" if value.channels_last else "")


def _header(program: Program, names: dict[int, str], name: str, comment: str, signature: str, size: int, fingerprint: str) -> str:
    upper = name.upper()
    counts = [
        f"#define {upper}_{names[id(v.root)].upper()}_COUNT {v.count} /* {_shape(v)} */"
        for v in [*program.inputs, *program.outputs]
    ]
    return "\n".join(
        [
            f"/* {name}.h: {comment} */",
            f"#ifndef {upper}_H\n#define {upper}_H\n",
            "#include <stdint.h>\n",
            f"#define {upper}_ARENA_BYTES {size} /* of static memory in {name}.c: all that the network needs beside the stack */",
            *counts,
            f'#define {upper}_FINGERPRINT "{fingerprint}"\n',
            '#ifdef __cplusplus\nextern "C" {\n#endif\n',
            "/* Compute one sample. Inputs and outputs may not overlap. Not reentrant: the arena is one. */",
            signature + ";\n",
            "#ifdef __cplusplus\n}\n#endif\n",
            "#endif\n",
        ]
    )


def steps_of(program: Program) -> list[tuple[int, Step]]:
    """Return the steps after which a value is whole, with their numbers: those that are traced."""
    last = {id(step.output): number for number, step in enumerate(program.steps)}
    return [(number, step) for number, step in enumerate(program.steps) if last[id(step.output)] == number]
