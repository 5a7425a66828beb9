"""SCARLET: clients send probabilities, the server sharpens their mean by a power; without the cache of labels."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm
from fedmd_jax.algorithms.ds_fl import send_sharpened
from fedmd_jax.algorithms.exchange import digest_by, exchange_algorithm, probabilities_report
from fedmd_jax.checks import check_positive
from fedmd_jax.client.losses import kl_of_probabilities


def scarlet(*, power: float = 2.0) -> Algorithm:
    """SCARLET: each client digests the mean of the clients' probabilities, raised to a power and normalised, with KL.

    Only the aggregation of the paper is here ("enhanced ERA"). Its cache, which saves traffic by using a label of the
    server again for some rounds, is not: all M labels are new in every round. Bytes: [M, C] floats up and down, as
    FedMD. A round of the paper begins with the digest of the labels of the round before and ends with the report; here
    the order is communicate, aggregate, digest, revisit, as in `ds_fl`.

    Args:
      power: of the mean. Above 1 it sharpens every row, unlike ERA; 1 is the plain mean, `ds_fl(temperature=None)`.

    Raises:
      ValueError: the power is not positive.

    References:
      SCARLET, 2025 (arXiv 2504.19602). Default of the released code: 2; 1 in the configuration of its reproduction. The
      cache of the released code does not store the new label of a row whose old label expired, so that such a row is
      requested twice.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.scarlet(power=2.0), subset_size=100)
      Federation(clients={'small': 2}, algorithm='scarlet')
    """
    check_positive("power", power)
    return exchange_algorithm(
        "scarlet",
        report=probabilities_report,
        aggregate=partial(send_sharpened, sharpen=partial(raise_to_power, power=power)),
        digest=digest_by(kl_of_probabilities),
    )


def raise_to_power(probabilities: chex.Array, *, power: float) -> chex.Array:
    """Probabilities to a power, normalised: the softmax of `power * log(probabilities)`.

    The logarithm keeps a row of small probabilities from underflow; zeros stay (almost) zeros.

    Args:
      probabilities: [..., C].
      power: above 1 to sharpen, below 1 to flatten.

    References:
      SCARLET, 2025 (arXiv 2504.19602), enhanced ERA.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> sharp = fmd.algorithms.raise_to_power(jnp.array([0.75, 0.25]), power=2.0)
      >>> [round(p, 3) for p in sharp.tolist()]
      [0.9, 0.1]
    """
    tiny = jnp.finfo(probabilities.dtype).tiny  # a row of zeros, of a round without reports, stays finite
    return jax.nn.softmax(power * jnp.log(jnp.maximum(probabilities, tiny)))
