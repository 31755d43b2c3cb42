"""Where a fault can be planted in a file of Python, and which: one small change of one place, found from the syntax tree.

    comparison   <  to <=, == to !=, is to is not, in to not in        arithmetic   + to -, * to /, // to *, ** to *, and to or
    constant     n to n + 1 and n - 1, True to False                   not          a condition is negated
    none         a function returns None                               dropped      a statement that is executed for its effect

What nobody's numbers depend on has no sites: texts, annotations, what is raised, what only a type checker reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLIPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One fault: the bytes from `start` to `end` of a file become `after`."""

    file: str
    line: int
    statement: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    inside: bool

    def planted(self, source: bytes) -> bytes:
        """Return the file with the fault in it."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def difference(self, source: bytes) -> tuple[str, str]:
        """Return the lines concerned, as they are and with the fault."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        faulty = source[first : self.start] + self.after.encode() + source[self.end : last]
        return source[first:last].decode().strip(), faulty.decode().strip()


def sites(path: Path, name: str) -> list[Site]:
    """Return all faults of a file, in its order; those that make no valid file are left out."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, statement, inside, asked in _walk(ast.parse(source), 1, False):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before = source[start:end].decode()
        place = {"line": node.lineno, "statement": statement, "start": start, "end": end, "inside": inside}
        for kind, after in _changes(node, before, asked):
            site = Site(file=name, kind=kind, before=before, after=after, **place)
            if _is_valid(site.planted(source)):
                found.append(site)
    return found


def _walk(node: ast.AST, statement: int, inside: bool) -> Iterator[tuple[Any, int, bool, bool]]:
    """Nodes that have a place and count: their statement's line, whether in a function's body, whether a condition."""
    for field, child in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "type_params", "type_comment"):
            continue
        deeper = inside or (field == "body" and isinstance(node, ast.FunctionDef))
        for one in child if isinstance(child, list) else [child]:
            if not isinstance(one, ast.AST) or isinstance(one, SILENT) or _for_types(one):
                continue
            line = one.lineno if isinstance(one, ast.stmt) else statement
            if hasattr(one, "lineno"):
                yield one, line, deeper, field == "test"
            yield from _walk(one, line, deeper)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _changes(node: ast.AST, before: str, asked: bool) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp):
        yield from _flipped(node)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", f"({node.value!r} + 1)"
        yield "constant", f"({node.value!r} - 1)"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", repr(not node.value)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "none", "return None"
    elif _acts(node):
        yield "dropped", "pass"
    if asked:
        yield "not", f"(not ({before}))"


def _acts(node: ast.AST) -> bool:
    """True for a call whose result nobody takes, and for a statement that changes something that has a value already."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom | ast.Await)
    into = isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
    return into or isinstance(node, ast.AugAssign)


def _flipped(node: ast.Compare | ast.BinOp | ast.BoolOp) -> Iterator[tuple[str, str]]:
    kind = "comparison" if isinstance(node, ast.Compare) else "arithmetic"
    op = node.ops[0] if isinstance(node, ast.Compare) else node.op
    other = FLIPS.get(type(op))
    if other is None or (isinstance(op, ast.Mod) and isinstance(node.left, ast.Constant)):
        return
    twin = ast.parse(ast.unparse(node), mode="eval").body
    if isinstance(twin, ast.Compare):
        twin.ops[0] = other()
    else:
        twin.op = other()
    yield kind, f"({ast.unparse(twin)})"


def _is_valid(source: bytes) -> bool:
    try:
        compile(source, "planted", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
