"""The browser's side: `UNPACK` is the path of a plain JavaScript module that makes packed ONNX files dense before a session is made.

onnxruntime-web folds packed weights at load by itself; the module does the same some 4 times faster, and works for runtimes that
would decode at each inference. `docs/web.md` shows a page.
"""

from pathlib import Path

UNPACK = Path(__file__).with_name("unpack.mjs")

__all__ = ["UNPACK"]
