"""torchopt: prune, cluster and quantize PyTorch models, and export one small ONNX file that ONNX Runtime runs fast."""
