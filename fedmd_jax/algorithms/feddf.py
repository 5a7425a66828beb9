"""FedDF: FedAvg whose means are fused across groups by distillation on the server."""

from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.aggregators.mean import weighted_mean
from fedmd_jax.algorithms.base import Algorithm
from fedmd_jax.algorithms.exchange import digest_completed
from fedmd_jax.algorithms.fedavg import GroupNetwork, load_network, network_of, parameters_algorithm
from fedmd_jax.algorithms.fedmd import report
from fedmd_jax.checks import check_positive
from fedmd_jax.client.losses import kl
from fedmd_jax.client.optimizers import init_optimizer
from fedmd_jax.client.phases import digest
from fedmd_jax.client.training import Distance, TrainingConfig
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.types import ClientState, PublicDataset, States


def feddf(*, temperature: float = 1.0) -> Algorithm:
    """FedDF: `fedavg`, then each mean network learns from the mean logits of all clients of all groups.

    The server scores the public subset with the networks that the clients sent; the mean of each group digests these
    mean logits (`digest_training`, with an optimizer that is fresh in each round) and is sent to the clients of the
    group. A group of which no client completed the round keeps its network.

    Bytes: as `fedavg`; the public dataset stays on the server.

    Args:
      temperature: of the softmax of teacher and student, 1 in the paper; see `kl`.

    Raises:
      ValueError: the temperature is not positive.

    References:
      Lin et al. 2020 (arXiv 2006.07242), Algorithm 3, section 3. There teachers count equally; here with the weights of
      their clients, as in the mean of the parameters. There the server makes up to 10,000 steps of Adam with a cosine
      schedule and early stopping on validation data, and drops the worst teachers; here `digest_training` decides, and
      no labels are used. The default of the released code is another teacher (`avg_losses`, the mean of probabilities);
      its published commands use the mean logits.

    Example:
      >>> import fedmd_jax as fmd
      >>> small, large = (fmd.architecture_from_linen(fmd.models.MLP((n,), num_classes=3)) for n in (4, 8))
      >>> groups = {"small": fmd.ArchitectureGroup(small, (0, 1)), "large": fmd.ArchitectureGroup(large, (2, 3))}
      >>> fmd.make_federation(groups, fmd.algorithms.feddf(), subset_size=100)
      Federation(clients={'small': 2, 'large': 2}, algorithm='feddf')
    """
    check_positive("temperature", temperature)
    return parameters_algorithm("feddf", fuse=partial(fuse_groups, distance=partial(kl, temperature=temperature)))


def fuse_groups(
    means: Mapping[str, GroupNetwork],
    weights: Mapping[str, chex.Array],
    clients: States,
    finite: Mapping[str, chex.Array],
    subset: PublicDataset,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    distance: Distance,
    groups: Groups,
    **over,
) -> tuple[dict[str, GroupNetwork], dict[str, chex.Array], dict[str, chex.Array]]:
    """The server of FedDF: the mean of each group digests the mean logits of all clients.

    Its only collective is one all-reduce of [M + 1, C]; every device trains all students alike.

    Args:
      means: per group.
      weights: per group, [K]; zero for clients that are no teachers.
      clients: per group, stacked clients [K, ...] after their private training.
      finite: per group, [K]; False for clients that are no teachers.
      subset: the public subset, [M, ...].
      key: shuffling and dropout.
      training: epochs, batches and optimizer of the students.
      distance: (logits [B, C], mean logits [B, C]) -> [B].
      groups: the architecture groups.
      **over: `mesh` and `clients_per_chunk` of `map_groups`.

    Returns:
      The means, their losses [E], and whether the training was finite, [], per group. A student that ends in NaN or
      infinity is reverted.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups, public = {"linear": fmd.ArchitectureGroup(linear, (0,))}, fmd.public_dataset(jnp.eye(4))
      >>> clients = fmd.fedmd(groups).new_states(jax.random.key(0), public.inputs)
      >>> means = {"linear": fmd.algorithms.GroupNetwork(jnp.zeros((4, 2)), {}, jnp.array(True))}
      >>> weights, finite = {"linear": jnp.ones(1)}, {"linear": jnp.array([True])}
      >>> means, losses, _ = fmd.algorithms.fuse_groups(
      ...     means, weights, clients, finite, public, jax.random.key(1), training=fmd.TrainingConfig(),
      ...     distance=fmd.kl, groups=groups)
      >>> losses["linear"].tolist()  # the client and the mean agree
      [0.0]
    """
    mean_logits = weighted_mean(_teach, (0, 0, None), groups=groups, **over)
    consensus, exists, _ = mean_logits(weights, clients, finite, subset.inputs)
    fused, losses, student_finite = {}, {}, {}
    for name, group in groups.items():
        learn = partial(_learn, group.architecture, training=training, distance=distance)
        own_key = jax.random.fold_in(key, group.client_ids[0])
        student = learn(means[name], subset.inputs, consensus, exists, own_key)
        fused[name], losses[name], student_finite[name] = student
    return fused, losses, student_finite


def _teach(architecture, state, finite, inputs):
    return jnp.where(finite, report(architecture, state, inputs, None), jnp.nan)  # NaN is left out of the mean


def _learn(architecture, mean, inputs, consensus, exists, key, *, training, distance):
    # What a mean has no value for, such as an integer in the batch statistics, is that of a new network.
    student = load_network(ClientState(*architecture.init(key, inputs), (), ()), mean)
    student = student._replace(digest_opt_state=init_optimizer(training.optimizer, student.params, key))
    digest_one = partial(digest, training=training, distance=distance)
    student, loss, finite = digest_completed(
        architecture, True, student, inputs, consensus, exists & mean.exists, key, digest=digest_one
    )
    return network_of(student, mean.exists), loss, finite
