"""From a function of one client to a group, to all groups, to many devices."""

from fedmd_jax.mapping.chunking import map_clients as map_clients, weighted_sum_clients as weighted_sum_clients
from fedmd_jax.mapping.grouped import client_costs as client_costs, map_groups as map_groups, sum_groups as sum_groups
from fedmd_jax.mapping.groups import (
    ArchitectureGroup as ArchitectureGroup,
    client_keys as client_keys,
    stack_private as stack_private,
)
from fedmd_jax.mapping.sharding import (
    ShardedClients as ShardedClients,
    client_mesh as client_mesh,
    fetch_to_host as fetch_to_host,
    gather_clients as gather_clients,
    replicate as replicate,
    shard_clients as shard_clients,
)
