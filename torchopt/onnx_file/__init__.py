"""An ONNX file of anyone's: read, seen whole through one view, and written again, byte by byte where it is large."""
