"""The members of the family, as the tests run them, with a server model if they take one."""

import toys

import fedmd_jax as fmd

A = fmd.algorithms

MEMBERS = {
    "fedmd": A.fedmd(),
    "ds-fl": A.ds_fl(temperature=0.1),
    "ds-fl-mean": A.ds_fl(temperature=None),
    "fedavg": A.fedavg(),
}
# Clients send parameters, so that groups decide what is averaged.
WITHIN_GROUPS = ("fedavg", "fedprox", "feddf")


def federation(name: str, groups=None, *, server: bool = False, **settings) -> fmd.Federation:
    """The toy federation of a member; its server has a network if `server` and if the member takes one."""
    algorithm = MEMBERS[name]
    network = toys.linear() if server and algorithm.takes_server_model else None
    return toys.federation(groups or toys.groups(), algorithm=algorithm, server=network, **settings)
