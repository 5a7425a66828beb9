"""The members of the family, as the tests run them, with a server model if they take one."""

import toys

import fedmd_jax as fmd

A = fmd.algorithms

MEMBERS = {
    "fedmd": A.fedmd(),
    "ds-fl": A.ds_fl(temperature=0.1),
    "ds-fl-mean": A.ds_fl(temperature=None),
    "scarlet": A.scarlet(power=2.0),
    "selective-fd": A.selective_fd(min_probability=0.3),
    "cfd": A.cfd(bits=2, down_bits=3),
    "kt-pfl": A.kt_pfl(temperature=2.0, pull=0.01),
    "fedavg": A.fedavg(),
    "fd": A.fd(gamma=0.5),
    "fedproto": A.fedproto(weight=2.0),
    "fedtgp": A.fedtgp(weight=2.0, num_steps=5),
    "fedprox": A.fedprox(proximal=0.1),
    "feddf": A.feddf(),
}
# Clients send parameters, so that groups decide what is averaged.
WITHIN_GROUPS = ("fedavg", "fedprox", "feddf")
# What a client sends is [M, C] floats.
SEND_ROWS = ("fedmd", "ds-fl", "ds-fl-mean", "scarlet", "kt-pfl")
# The target of clients that send the same is what they send, and the distance is smooth, unlike that of FedMD.
AGREE = ("ds-fl-mean", "kt-pfl", "selective-fd")


def federation(name: str, groups=None, *, server: bool = False, **settings) -> fmd.Federation:
    """The toy federation of a member; its server has a network if `server` and if the member takes one."""
    algorithm = MEMBERS[name]
    network = toys.linear() if server and algorithm.takes_server_model else None
    return toys.federation(groups or toys.groups(), algorithm=algorithm, server=network, **settings)
