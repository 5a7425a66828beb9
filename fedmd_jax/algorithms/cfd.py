"""CFD: probabilities are quantised to a few bits, up and down."""

import math
from functools import partial
from typing import Any

import chex
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm, Sizes, Traffic
from fedmd_jax.algorithms.exchange import Report, digest_by, exchange_algorithm, probabilities_report
from fedmd_jax.checks import check_count
from fedmd_jax.client.losses import kl_of_probabilities
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset


def cfd(*, bits: int = 1, down_bits: int | None = None) -> Algorithm:
    """CFD: each client sends quantised probabilities, and digests their quantised mean with the cross entropy.

    A server with a network digests the mean, and the quantised probabilities of its network go down instead. The paper
    needs that if not all clients take part.

    Bytes: a row is one of binom(2^bits + C - 2, C - 1) codes, and M rows are counted as log2 of their number; C = 10
    gives 3.32, 7.78 and 20.3 bits a row for 1, 2 and 4 bits. That is before the paper's delta coding (only rows that
    changed, which needs a fixed public subset) and arithmetic coding, neither of which is here: arrays stay floats
    that hold the values of the codes.

    Args:
      bits: of a probability on its way up; 1 sends the predicted class.
      down_bits: on the way down; None for the same.

    Raises:
      ValueError: bits are not an integer from 1 to 16.

    References:
      Sattler et al. 2020 (arXiv 2012.00632), constrained quantisation and dual distillation. Differences: the clients
      of the paper start from the same new network in each round, and a round is digest, revisit, report; here clients
      keep their networks, and the order is that of `ds_fl`. Ties are broken by the class index, in the paper at
      random. No code was released; the "CFD" among SCARLET's baselines sends the predicted class up and floats down.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.cfd(bits=1), subset_size=100)
      Federation(clients={'small': 2}, algorithm='cfd')
    """
    down_bits = bits if down_bits is None else down_bits
    for name, value in {"bits": bits, "down_bits": down_bits}.items():
        check_count(name, value)
        if value > 16:  # float32 has 24 bits for the sum and the fractions that decide
            raise ValueError(f"{name} must be at most 16, got {value}")

    def traffic(sizes: Sizes) -> Traffic:
        return Traffic(*(code_bytes(sizes.subset_size, sizes.num_classes, bits=b) for b in (bits, down_bits)))

    return exchange_algorithm(
        "cfd",
        report=partial(quantized_report, bits=bits),
        answer=partial(quantized_answer, bits=down_bits),
        digest=digest_by(kl_of_probabilities),
        traffic=traffic,
    )


def quantize(probabilities: chex.Array, *, bits: int) -> chex.Array:
    """The nearest vector, in L1, of multiples of 1 / (2^bits - 1) that sum to 1.

    All classes are rounded down, and what is missing is given to those that lost most. This is exact: a step of a class
    costs -1, in units of a multiple, below its probability, 1 - 2 * (what it lost) across it, and 1 above.

    Args:
      probabilities: [..., C], of sum 1.
      bits: from 1 to 16; 1 gives the one-hot row of the largest.

    Returns:
      [..., C]. Of classes that lost equally the first come first. Rows that are not finite stay so.

    References:
      Sattler et al. 2020 (arXiv 2012.00632), constrained quantisation.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> (3 * fmd.algorithms.quantize(jnp.array([0.5, 0.3, 0.2]), bits=2)).tolist()
      [1.0, 1.0, 1.0]
      >>> fmd.algorithms.quantize(jnp.array([0.5, 0.5, 0.0]), bits=1).tolist()
      [1.0, 0.0, 0.0]
    """
    num_steps = 2**bits - 1
    exact = num_steps * probabilities
    rounded = jnp.floor(exact)
    missing = num_steps - jnp.sum(rounded, axis=-1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(rounded - exact, axis=-1, stable=True), axis=-1)  # 0: lost most
    return (rounded + (rank < missing)) / num_steps


def code_bytes(num_rows: int, num_classes: int, *, bits: int) -> int:
    """The bytes of the codes of rows of classes.

    >>> code_bytes(5000, 10, bits=1)  # 5000 * log2(10) / 8
    2077
    """
    num_codes = math.comb(2**bits - 1 + num_classes - 1, num_classes - 1)
    return math.ceil(num_rows * math.log2(num_codes) / 8)


def quantized_report(
    architecture: Architecture, state: ClientState, subset: PublicDataset, private: PrivateDataset, *, bits: int
) -> Report:
    """The quantised probabilities of the public subset, [M, C]."""
    report = probabilities_report(architecture, state, subset, private)
    return report._replace(values=quantize(report.values, bits=bits))


def quantized_answer(
    server: Architecture | None, model: Any, subset: PublicDataset, mean: chex.Array, *, bits: int
) -> chex.Array:
    """What goes down, [M, C]: the quantised probabilities of the server's network, or the mean if it has none."""
    if server is not None:
        mean = probabilities_report(server, model, subset, None).values
    return quantize(mean, bits=bits)
