"""Seeded partitions of a labelled data set among clients.

A partition is a list with one index array per client. Every function takes arrays first, settings as keywords, and
`rng` last; the same generator state gives the same partition. No example goes to two clients. Impossible requests are
refused before `rng` is used.
"""

from fedmd_jax.data.partition.by_class import split_by_class, split_k_classes
from fedmd_jax.data.partition.by_group import split_by_superclass, split_by_writer
from fedmd_jax.data.partition.skewed import lognormal, power_law, split_by_quantity, split_dirichlet

__all__ = [
    "lognormal",
    "power_law",
    "split_by_class",
    "split_by_quantity",
    "split_by_superclass",
    "split_by_writer",
    "split_dirichlet",
    "split_k_classes",
]
