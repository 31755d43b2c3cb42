"""What torch's exporter notes on nodes and values of a graph, taken out: no runtime reads it, and it can be a quarter of a file."""

from __future__ import annotations

from collections.abc import MutableMapping

import onnx_ir as ir

from torchopt.onnx_file.read import SHAPES
from torchopt.onnx_file.view import scopes_of

NOTES = ("pkg.torch", "namespace")  # what the keys of the exporter's metadata begin with, or are


def strip_notes(model: ir.Model) -> bool:
    """Remove the exporter's metadata from all nodes and values of a model, in place, and say whether there was any.

    Other tools' metadata, names and documentation stay.
    """
    found = False
    for scope in scopes_of(model):
        graph = scope.body
        values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
        values += graph.initializers.values() if isinstance(graph, ir.Graph) else []
        for holder in (graph, *graph, *values):
            found |= _strip(holder.metadata_props)
        for info in graph.meta.get(SHAPES, ()):
            kept = [entry for entry in info.metadata_props if not _is_note(entry.key)]
            found |= len(kept) < len(info.metadata_props)
            del info.metadata_props[:]
            info.metadata_props.extend(kept)
    return found


def _strip(more: MutableMapping[str, str]) -> bool:
    notes = [key for key in more if _is_note(key)]
    for key in notes:
        del more[key]
    return bool(notes)


def _is_note(key: str) -> bool:
    return key.startswith(NOTES[0]) or key == NOTES[1]
