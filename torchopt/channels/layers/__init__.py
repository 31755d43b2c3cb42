"""Cutting one layer: torch-pruning's pruners, and those that it has not."""
