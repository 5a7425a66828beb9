"""DS-FL: clients send probabilities, the server sharpens their mean (entropy reduction aggregation)."""

from collections.abc import Callable
from functools import partial

import chex
import jax

from fedmd_jax.algorithms.base import Algorithm
from fedmd_jax.algorithms.exchange import Mean, digest_by, exchange_algorithm, probabilities_report
from fedmd_jax.checks import check_positive
from fedmd_jax.client.losses import kl_of_probabilities
from fedmd_jax.types import PublicDataset


def ds_fl(*, temperature: float | None = 0.1) -> Algorithm:
    """DS-FL: each client digests the sharpened mean of the clients' probabilities with the cross entropy.

    Bytes: [M, C] floats up and down, as FedMD. The paper's round ends with the report and begins with the digest of the
    labels of the round before; here a round is communicate, aggregate, digest, revisit, which is the same sequence with
    another beginning, so that all methods are evaluated at the same point.

    Args:
      temperature: of the entropy reduction (ERA), 0.1 in the paper; None for the plain mean (SA). ERA takes
        probabilities for logits, so that a temperature of 1 is not the plain mean but almost uniform.

    Raises:
      ValueError: the temperature is not positive.

    References:
      Itahara et al. 2020 (arXiv 2008.06180), Algorithm 1, ERA. Released implementations that leave the temperature
      out, or apply it to mean logits, are not ERA.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.ds_fl(temperature=0.1), subset_size=100)
      Federation(clients={'small': 2}, algorithm='ds-fl')
    """
    if temperature is not None:
        check_positive("temperature", temperature)
    return exchange_algorithm(
        "ds-fl",
        report=probabilities_report,
        aggregate=partial(send_sharpened, sharpen=partial(reduce_entropy, temperature=temperature)),
        digest=digest_by(kl_of_probabilities),
    )


def reduce_entropy(probabilities: chex.Array, *, temperature: float | None) -> chex.Array:
    """ERA: the softmax of probabilities over a temperature.

    Args:
      probabilities: [..., C].
      temperature: below about 0.15 it sharpens clear rows; None to leave the probabilities as they are.

    References:
      Itahara et al. 2020, ERA.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> sharp = fmd.algorithms.reduce_entropy(jnp.array([0.6, 0.4]), temperature=0.1)
      >>> [round(p, 3) for p in sharp.tolist()]
      [0.881, 0.119]
    """
    return probabilities if temperature is None else jax.nn.softmax(probabilities / temperature)


def send_sharpened(
    mean: Mean,
    subset: PublicDataset,
    memory: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    sharpen: Callable[[chex.Array], chex.Array],
) -> tuple[chex.Array, chex.ArrayTree]:
    """The server: the targets are `sharpen(mean)`, [M, C]."""
    del subset, key
    return sharpen(mean.values), memory
