"""FedProx: FedAvg with a term in the private loss that keeps clients near the start of the round."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm
from fedmd_jax.algorithms.exchange import revisit_alone
from fedmd_jax.algorithms.fedavg import parameters_algorithm
from fedmd_jax.checks import check_not_negative
from fedmd_jax.client.losses import at_least_float32
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, TrainingInfo


def fedprox(*, proximal: float = 0.01) -> Algorithm:
    """FedProx: `fedavg` with a proximal term, `proximal / 2` times the squared distance to the start of the round.

    The start is the network of the group; in the first round, that of the client. The term is part of the loss: the
    recorded revisit losses contain it, and an optimizer such as Adam scales its gradient with the rest. It does not
    concern batch statistics.

    Bytes: as `fedavg`.

    Args:
      proximal: mu of the paper, which tunes it among 0.001, 0.01, 0.1 and 1; 0 is `fedavg`.

    Raises:
      ValueError: the factor is negative or not finite.

    References:
      Li et al. 2018 (arXiv 1812.06127), Algorithm 2 and equation 2. There stragglers send what they have, devices are
      sampled by their weights and averaged equally, and the optimizer is fresh in each round; here stragglers are left
      out, the mean is weighted, and optimizers persist, as in `fedavg`.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.fedprox(proximal=0.1))
      Federation(clients={'small': 2}, algorithm='fedprox')
    """
    check_not_negative("proximal", proximal)
    return parameters_algorithm("fedprox", revisit=partial(revisit_near_start, proximal=proximal))


def revisit_near_start(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    targets: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    proximal: float,
) -> tuple[ClientState, TrainingInfo]:
    """The revisit of one client, with the proximal term as a further penalty of its network."""

    def squared_distance(own, start):
        return jnp.sum(jnp.square(at_least_float32(own - start)))

    def penalty(params):
        distances = jax.tree.map(squared_distance, params, state.params)
        return architecture.penalty(params) + proximal / 2 * sum(jax.tree.leaves(distances))

    near_start = architecture._replace(penalty=penalty)
    return revisit_alone(near_start, state, private, targets, key, training=training)
