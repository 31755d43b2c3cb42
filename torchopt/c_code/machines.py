"""Where C code is run for its proof: this machine under the sanitizers, and Cortex-M processors in QEMU with semihosting.

The same harness (`board/harness.c`) runs on all: it reads samples from a file and writes what every step gives. In QEMU each instruction
takes the same time on its virtual clock (`-icount`), so that ticks are instructions; a real processor takes more cycles than that.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from torchopt.c_code.emit import steps_of
from torchopt.c_code.program import C_TYPE, Program
from torchopt.errors import FileError, ModelError

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
ICOUNT = 3  # an instruction takes 2^3 ns of the virtual clock
TICK = 40  # ns, of the boards' 25 MHz
PATIENCE = 600  # seconds for one run
BOARD = ("-mthumb", "-mfloat-abi=hard")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A place to run C.

    Attributes:
        name: what it is called.
        compilers: the first of these that is installed compiles.
        flags: for it.
        emulator: the command that runs the program; empty where it runs by itself.
        install: what to install where something is missing.
    """

    name: str
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    install: str = "install gcc or clang"

    @property
    def missing(self) -> str:
        """Why nothing runs here; empty where it does."""
        if not any(map(shutil.which, self.compilers)):
            return f"{' or '.join(self.compilers)} is not installed; {self.install}"
        if self.emulator and not shutil.which(self.emulator[0]):
            return f"{self.emulator[0]} is not installed; {self.install}"
        return ""


def _board(name: str, processor: str, unit: str, board: str) -> Machine:
    emulator = (
        "qemu-system-arm",
        "-M",
        board,
        "-nographic",
        "-icount",
        f"shift={ICOUNT}",
        "-semihosting-config",
        "enable=on,target=native",
    )
    flags = (*BOARD, f"-mcpu={processor}", f"-mfpu={unit}", "-DBOARD")
    return Machine(
        name=name,
        compilers=("arm-none-eabi-gcc",),
        flags=flags,
        emulator=emulator,
        install="Debian's packages gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm have both",
    )


MACHINES = {
    "host": Machine(name="host", compilers=("gcc", "clang", "cc"), flags=SANITIZERS),
    "host-fast": Machine(name="host-fast", compilers=("gcc", "clang", "cc"), flags=("-O3", "-march=native")),
    "cortex-m4": _board("cortex-m4", "cortex-m4", "fpv4-sp-d16", "mps2-an386"),
    "cortex-m7": _board("cortex-m7", "cortex-m7", "fpv5-d16", "mps2-an500"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """What a program gave.

    Attributes:
        values: of each traced step, by its number: one row a sample, in the order in which they lie in memory.
        outputs: of the network, in order; one row a sample.
        instructions: of each traced step, of one sample; empty on this machine.
    """

    values: dict[int, np.ndarray]
    outputs: list[np.ndarray]
    instructions: dict[int, int]


class Built:
    """A network compiled for a machine, in a folder that lives as long as the context.

    Args:
        source: the .c file; its header lies beside it.
        program: what it was written from.
        machine: where it is to run.

    Raises:
        ModelError: the compiler refuses it.
    """

    def __init__(self, source: Path, program: Program, machine: Machine) -> None:
        self.program, self.machine, self.name = program, machine, source.stem
        self.compiler = next(filter(None, map(shutil.which, machine.compilers)))
        self.folder = tempfile.TemporaryDirectory()
        self.place = Path(self.folder.name)
        try:
            self._build(source)
        except BaseException:
            self.folder.cleanup()
            raise

    def __enter__(self) -> Built:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def _build(self, source: Path) -> None:
        machine = self.machine
        header = source.with_suffix(".h")
        for file in (source, header):
            if not file.is_file():
                raise FileError(f"{file}: there is no such file; export writes the .c file and its header side by side")
            shutil.copy(file, self.place / file.name)
        (self.place / "main.c").write_text(self._harness(), encoding="utf-8")
        traced = ("-DTORCHOPT_TRACE", *STRICT, *machine.flags)
        self._compile([*traced, "-c", source.name, "-o", "traced.o"])
        sources = ["main.c", "traced.o"]
        if machine.emulator:
            for name in ("startup.c", "memory.ld"):
                (self.place / name).write_text(_board_file(name), encoding="utf-8")
            sources += ["startup.c", "-nostartfiles", "-specs=rdimon.specs", "-T", "memory.ld", "-Wl,--no-warn-rwx-segments"]
        self._compile([*STRICT[1:-1], *machine.flags, *sources, "-o", "program", "-lm"])

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of flash and of static RAM that the network takes, compiled without the harness."""
        self._compile([*STRICT, *self.machine.flags, "-c", f"{self.name}.c", "-o", "plain.o"])
        size = self.compiler.removesuffix("gcc") + "size" if self.compiler.endswith("gcc") else "size"
        text, data, bss = map(int, self._ran([size, "plain.o"]).splitlines()[1].split()[:3])
        return text + data, data + bss

    def run(self, samples: Sequence[dict[str, np.ndarray]]) -> Ran:
        """Run the network on samples, each a feed of the graph."""
        with open(self.place / "inputs.bin", "wb") as file:
            for sample in samples:
                for value in self.program.inputs:
                    file.write(np.ascontiguousarray(sample[value.name], value.dtype).tobytes())
        self._ran([*self.machine.emulator, *(["-kernel"] if self.machine.emulator else []), str(self.place / "program")])
        traced = steps_of(self.program)
        parts = [(step.output.dtype, step.output.count) for _, step in traced] + [
            (v.dtype, v.count) for v in self.program.outputs
        ]
        record = np.dtype([(f"f{k}", dtype, (count,)) for k, (dtype, count) in enumerate(parts)])
        rows = np.fromfile(self.place / "traces.bin", record)
        if len(rows) != len(samples):
            raise ModelError(
                f"{self.name}.c on {self.machine.name}: gave {len(rows)} results of {len(samples)}; this is a defect"
            )
        lines = (self.place / "ticks.txt").read_text(encoding="utf-8").split("\n")[: len(traced)]
        ticks = [list(map(int, line.split())) for line in lines] if self.machine.emulator else []
        return Ran(
            values={number: rows[f"f{k}"] for k, (number, _) in enumerate(traced)},
            outputs=[rows[f"f{len(traced) + k}"] for k in range(len(self.program.outputs))],
            instructions={step: count * TICK // 2**ICOUNT for step, count in ticks},
        )

    def _harness(self) -> str:
        names = [f"given{k}" for k in range(len(self.program.inputs))] + [f"result{k}" for k in range(len(self.program.outputs))]
        values = [*self.program.inputs, *self.program.outputs]
        buffers = [f"static {C_TYPE[v.dtype]} {n}[{v.count}];" for n, v in zip(names, values, strict=True)]
        given = len(self.program.inputs)
        read = " && ".join(f"fread({n}, sizeof {n}, 1, inputs) == 1" for n in names[:given])
        write = "\n        ".join(f"if (fwrite({n}, sizeof {n}, 1, traces) != 1)\n            return 4;" for n in names[given:])
        text = _board_file("harness.c")
        fields = {"name": self.name, "buffers": "\n".join(buffers), "read": read, "write": write, "arguments": ", ".join(names)}
        for key, value in fields.items():
            text = text.replace(f"@{key}@", value)
        return text

    def _compile(self, arguments: list[str]) -> None:
        self._ran([self.compiler, *arguments])

    def _ran(self, command: list[str]) -> str:
        try:
            done = subprocess.run(
                command, cwd=self.place, capture_output=True, text=True, check=False, timeout=PATIENCE, stdin=subprocess.DEVNULL,
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            reason = f"took more than {PATIENCE} s on {self.machine.name}; fewer samples are needed"
            raise ModelError(f"{self.name}.c: {reason}") from error
        if done.returncode != 0:
            told = " ".join((done.stderr or done.stdout).split())[:600]
            what = Path(command[0]).name
            raise ModelError(f"{self.name}.c on {self.machine.name}: {what} ended with {done.returncode}: {told}")
        return done.stdout


def _board_file(name: str) -> str:
    return (resources.files("torchopt.c_code") / "board" / name).read_text(encoding="utf-8")
