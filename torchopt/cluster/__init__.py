"""Shared values: few distinct weights per layer, found by exact one-dimensional k-means and trained with the model."""

from torchopt.cluster.attach import attach, bake, refit, shared_weights, soft_until, table_of, update
from torchopt.cluster.config import Cluster
from torchopt.cluster.consistency import damaged, evaluations, stale
from torchopt.cluster.shared import SharedWeights
from torchopt.cluster.tables.kmeans import kmeans, squared_error

__all__ = [
    "Cluster",
    "SharedWeights",
    "attach",
    "bake",
    "damaged",
    "evaluations",
    "kmeans",
    "refit",
    "shared_weights",
    "soft_until",
    "squared_error",
    "stale",
    "table_of",
    "update",
]
