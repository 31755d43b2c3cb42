"""Where each value lies in the one static arena, so that it is as small as the values that live at the same time.

A value lives from the step that writes it to the last one that reads it. Two values that live at the same time lie apart, but for one
case: a step that reads its input row by row may write its output over the rows that it has read. Then the output starts by a known
number of bytes before the input (`Step.overlap`; He et al.'s and others' "diagonal" memory). Values are placed one by one at the lowest
free offset, in several orders; the smallest arena is taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torchopt.c_code.program import Program, Step, Value

ALIGNED = 8  # bytes; of the largest element twice over
TRIES = 60  # orders, beside the two that mostly win


@dataclass(frozen=True, kw_only=True)
class Arena:
    """The offset of each value, by its identity; of each step's working memory, by the step's number; and the whole size in bytes."""

    offsets: dict[int, int]
    scratch: dict[int, int]
    size: int


@dataclass(kw_only=True, eq=False)
class _Block:
    """Something that takes memory from step `first` to step `last`."""

    size: int
    first: int
    last: int
    value: Value | None = None
    step: int = -1


def planned(program: Program) -> Arena:
    """Place everything."""
    blocks = _blocks(program)
    allowed = _allowed(program, blocks)
    chance = random.Random(0)
    orders = [sorted(blocks, key=lambda b: (-b.size, b.first)), sorted(blocks, key=lambda b: b.first)]
    orders += [chance.sample(blocks, len(blocks)) for _ in range(TRIES)]
    best: tuple[int, dict[int, int]] | None = None
    for order in orders:
        placed = _placed(order, allowed)
        size = max((placed[id(b)] + b.size for b in blocks), default=0)
        if best is None or size < best[0]:
            best = size, placed
    assert best is not None
    size, placed = best
    return Arena(
        offsets={id(b.value): placed[id(b)] for b in blocks if b.value is not None},
        scratch={b.step: placed[id(b)] for b in blocks if b.value is None},
        size=-(-size // ALIGNED) * ALIGNED,
    )


def largest_pair(program: Program) -> int:
    """Return the bytes of the largest output together with its largest input, which no arena of separate buffers can do without."""
    sizes = []
    for step in program.steps:
        read = [value.root.size for value in step.inputs if value.in_arena]
        written = step.output.root.size if step.output.in_arena else 0
        sizes.append(max(read, default=0) + written)
    return max(sizes, default=0)


def _blocks(program: Program) -> list[_Block]:
    found: dict[int, _Block] = {}
    scratch = []
    for number, step in enumerate(program.steps):
        for value in [*step.inputs, step.output]:
            if value.in_arena:
                block = found.setdefault(
                    id(value.root), _Block(size=value.root.size, first=number, last=number, value=value.root)
                )
                block.last = number
        if step.scratch:
            scratch.append(_Block(size=step.scratch, first=number, last=number, step=number))
    return [*found.values(), *scratch]


def _allowed(program: Program, blocks: list[_Block]) -> dict[tuple[int, int], int]:
    """For (output, input): by how many bytes the output must lie before the input to share memory with it."""
    by_value = {id(b.value): b for b in blocks if b.value is not None}
    found = {}
    for number, step in enumerate(program.steps):
        out = by_value.get(id(step.output.root))
        for index, distance in step.overlap.items():
            into = by_value.get(id(step.inputs[index].root))
            if out is None or into is None or into.last != number or out.first != number or _read_twice(step, index):
                continue
            found[id(out), id(into)] = -(-distance // ALIGNED) * ALIGNED
    return found


def _read_twice(step: Step, index: int) -> bool:
    return sum(value.root is step.inputs[index].root for value in step.inputs) > 1


def _placed(order: list[_Block], allowed: dict[tuple[int, int], int]) -> dict[int, int]:
    offsets: dict[int, int] = {}
    done: list[_Block] = []
    for block in order:
        taken = []
        for other in done:
            if other.first > block.last or block.first > other.last:
                continue
            low, high = offsets[id(other)] - block.size, offsets[id(other)] + other.size  # offsets strictly between are not free
            before = allowed.get((id(block), id(other)))
            after = allowed.get((id(other), id(block)))
            if before is not None:
                low = max(low, offsets[id(other)] - before)
            if after is not None:
                high = min(high, offsets[id(other)] + after)
            taken.append((low, high))
        offset = 0
        while any(low < offset < high for low, high in taken):
            offset = -(-min(high for low, high in taken if low < offset < high) // ALIGNED) * ALIGNED
        offsets[id(block)] = offset
        done.append(block)
    return offsets
