"""What every technique knows of a network: weights, grids, batches, norms, gradients, graph, copies, and proof that two are one."""
