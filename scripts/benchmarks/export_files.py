"""What packing costs besides the weights: the file's own bytes in tiny networks, bytes for each further tensor, and memory.

A part of `scripts/bench export`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from harness import Row, note
from onnx import TensorProto, helper, numpy_helper

from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule, export, one_shot
from torchopt.models import build
from torchopt.pack import pack

TINY = {"ResNet-8": ("resnet8", 10, (3, 32, 32)), "DS-CNN": ("ds_cnn", 12, (1, 49, 10))}
WIDTH, LAYERS = 4096, 3  # 16.8 million weights a tensor
MEASURED = """
import sys
from torchopt.export import unpack
from torchopt.pack import pack
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = kilobytes("VmRSS")
{"pack": pack, "unpack": unpack}[sys.argv[1]](*sys.argv[2:])
print(kilobytes("VmHWM") - before)
"""


def fixed_rows(folder: Path) -> list[Row]:
    """Everything in the file that is no weight code, table or bias, of the networks of MLPerf Tiny."""
    rows = []
    for name, (kind, classes, shape) in TINY.items():
        torch.manual_seed(0)
        x = torch.randn(8, *shape)
        for form, more in (("int8", {"quantize": Quantize(observer="minmax")}), ("float", {})):
            shared: dict[str, Any] = {
                "prune": Prune(schedule=ConstantSparsity(target_sparsity=0.8)),
                "cluster": Cluster(n_clusters=16),
            }
            rule = Rule("*", **shared, **more)
            small = one_shot(build(kind, classes, shape[0]), [rule], [x], example_inputs=(x[:1],), progress=False)
            result = export(small, (x[:1],), folder / "tiny.onnx")
            assert result.packing is not None
            weights = result.packing.packed_bytes + sum(left.dense_bytes for left in result.packing.left)
            biases = sum(p.numel() * p.element_size() for n, p in small.named_parameters() if n.endswith("bias"))
            rest = result.size_bytes - weights - biases
            parts = f"{result.size_bytes:,} − {weights:,} of weights − {biases:,} of biases"
            what = f"bytes of {name}, {form}, that are no weight codes, tables or biases"
            rows.append(Row(what=what, asked="≤ 8,192", reached=f"{rest:,}", holds=rest <= 8192, note=parts))
    return rows


def further_row(folder: Path) -> Row:
    """What each further packed tensor takes beside its codes and table, over the codecs."""
    costs = {}
    for sparsity, values in ((0.0, 16), (0.0, 30), (0.0, 60), (0.0, 100), (0.5, 16), (0.8, 16), (0.9, 40), (0.96, 2), (0.6, 0)):
        sizes = []
        for count in (4, 5):  # with fewer, another codec may win whose decoder is smaller
            codec, size = _overhead(folder, sparsity, values, count)
            sizes.append(size)
        costs[codec] = sizes[1] - sizes[0]
    worst = max(costs, key=lambda codec: costs[codec])
    return Row(
        what=f"bytes for each further packed tensor, worst of {len(costs)} codecs",
        asked="≤ 150",
        reached=str(costs[worst]),
        holds=costs[worst] <= 150,
        note=", ".join(f"{codec} {size}" for codec, size in costs.items()),
    )


def _overhead(folder: Path, sparsity: float, values: int, count: int) -> tuple[str, int]:
    """(the codec, the file's bytes without its tensors' and without the nodes that read them)."""
    rng, shape = np.random.default_rng(0), (91, 131)
    constants, nodes = [], []
    for i in range(count):
        w = rng.standard_normal(shape) if not values else rng.choice(rng.standard_normal(values), size=shape)
        constants.append(numpy_helper.from_array((w * (rng.random(shape) >= sparsity)).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, None)] for n in ("x", "y0")]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "a.onnx")
    report = pack(folder / "a.onnx", folder / "b.onnx")
    own = sum(node.ByteSize() + 2 for node in nodes)
    return report.rows[0].codec, (folder / "b.onnx").stat().st_size - report.packed_bytes - own


def memory_row(folder: Path) -> Row:
    """Peak resident memory of pack and of unpack, each in a process of its own."""
    found = {}
    for dtype in (np.float32, np.int8):
        for sparsity, values in ((0.0, 16), (0.0, 60), (0.5, 16), (0.5, 100), (0.8, 16), (0.9, 2)):
            note(f"memory, {np.dtype(dtype).name}, sparsity {sparsity}, {values} values")
            dense, packed, back = (folder / f"{name}.onnx" for name in ("large", "large_packed", "large_back"))
            largest = _large(dense, sparsity, values, dtype)
            for verb, source, target in (("pack", dense, packed), ("unpack", packed, back)):
                grown = 1024 * int(
                    subprocess.check_output([sys.executable, "-c", MEASURED, verb, str(source), str(target)], text=True)
                )
                where = f"{verb}, {np.dtype(dtype).name}, sparsity {sparsity}, {values} values"
                found[where] = ((grown - source.stat().st_size) / largest, grown / largest)
    worst = max(found, key=lambda where: found[where])
    beyond, in_all = found[worst][0], max(total for _, total in found.values())
    return Row(
        what=f"memory beyond the file that is read / the largest tensor ({LAYERS} of {WIDTH**2 / 1e6:.1f} M weights)",
        asked="≤ 3",
        reached=f"{beyond:.1f}",
        holds=beyond <= 3,
        note=f"worst of {len(found)}: {worst}; the file's own pages included, {in_all:.1f} at most",
    )


def _large(path: Path, sparsity: float, values: int, dtype: Any) -> int:
    """Write a file of a few large tensors, and return the bytes of one."""
    rng, constants, nodes = np.random.default_rng(0), [], []
    pool = rng.permutation(np.r_[-128:0, 1:128])[:values] if dtype == np.int8 else rng.standard_normal(values)
    for i in range(LAYERS):
        w = pool.astype(dtype)[rng.integers(0, values, (WIDTH, WIDTH), np.uint8)]
        w[rng.random(w.shape, np.float32) < sparsity] = 0
        constants.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("Identity", [f"w{i}"], [f"y{i}"]))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = [helper.make_tensor_value_info(f"y{i}", kind, [WIDTH, WIDTH]) for i in range(LAYERS)]
    graph = helper.make_graph(nodes, "g", [], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return w.nbytes
