"""The graph of a network: traced, fused to what one integer kernel computes, and quantizers placed in it."""
