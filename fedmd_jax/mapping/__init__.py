"""From a function of one client to a group, to all groups, to many devices."""

from fedmd_jax.mapping.chunking import map_clients, weighted_sum_clients
from fedmd_jax.mapping.grouped import client_costs, map_groups, sum_groups
from fedmd_jax.mapping.groups import ArchitectureGroup, client_keys, stack_private
from fedmd_jax.mapping.sharding import (
    ShardedClients,
    client_mesh,
    fetch_to_host,
    gather_clients,
    replicate,
    shard_clients,
)

__all__ = [
    "ArchitectureGroup",
    "ShardedClients",
    "client_costs",
    "client_keys",
    "client_mesh",
    "fetch_to_host",
    "gather_clients",
    "map_clients",
    "map_groups",
    "replicate",
    "shard_clients",
    "stack_private",
    "sum_groups",
    "weighted_sum_clients",
]
