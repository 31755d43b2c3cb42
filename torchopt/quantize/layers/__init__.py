"""The quantized layers: how each rounds its weights and its activations, in training and at the runtime's integers."""
