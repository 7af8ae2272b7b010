"""Clustering of sub-vectors: nearest-codeword assignment and weighted, masked k-means.

`assign` maps sub-vectors to their nearest centroids; `kmeans` learns the centroids and reports on
every iteration in a `KMeansResult`. Both work under `jax.jit`, `jax.vmap` and `jax.lax.map`.
"""

from ssvq_jax.clustering.assignment import assign
from ssvq_jax.clustering.kmeans import KMeansResult, kmeans

__all__ = ["KMeansResult", "assign", "kmeans"]
