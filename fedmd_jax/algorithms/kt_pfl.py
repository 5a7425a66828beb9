"""KT-pFL: the server mixes a personal target for each client, with the coefficients of a K x K matrix."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm
from fedmd_jax.algorithms.exchange import Report, digest_by, exchange_algorithm, probabilities_report
from fedmd_jax.checks import check_positive
from fedmd_jax.client.losses import kl_of_probabilities
from fedmd_jax.types import PublicDataset


def kt_pfl(*, temperature: float = 10.0, pull: float = 0.7) -> Algorithm:
    """KT-pFL: each client digests its own mixture of the clients' probabilities, with KL at a temperature.

    Client n minimizes mse(p_n, sum_m c_nm p_m) + pull * mse(c_n, weights of the clients) over its row of coefficients,
    which has an exact solution, see `solve_mixture`; the server remembers nothing. Without a pull a client would mix
    only its own probabilities. At temperature 10 probabilities are close to uniform and their squares small: with the
    default pull the rows are close to the weights, and the targets to the mean.

    Bytes: [M, C] floats up and down, as FedMD; the ones down are personal and cannot be broadcast. On a mesh the
    reports of all clients are gathered on every device, [K, M, C].

    Excluded and dropped clients, and clients of weight 0, are in no mixture; their own target, if they digest, is the
    mean.

    Args:
      temperature: of the softmax in the report and in the digest, whose loss is multiplied by its square.
      pull: of the coefficients towards the weights of the clients (rho). Smaller: more personal targets.

    Raises:
      ValueError: an argument is not positive.

    References:
      Zhang et al. 2021 (arXiv 2111.02862). Differences of the released code: one gradient step per round instead of the
      solution, and softmax(5 c) applied to the matrix again in each round, whose fixed points depend on K and not on
      the data; a pull to 1 / K without weights; a gradient of the digest that is 1 / (C T^2) of the one here (a mean
      over classes, and no T^2); evaluation before the digest.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.kt_pfl(pull=0.01), subset_size=100)
      Federation(clients={'small': 2}, algorithm='kt-pfl')
    """
    check_positive("temperature", temperature)
    check_positive("pull", pull)
    return exchange_algorithm(
        "kt-pfl",
        report=partial(probabilities_report, temperature=temperature),
        aggregate_all=partial(send_mixtures, pull=pull),
        digest=digest_by(partial(tempered_kl, temperature=temperature)),
    )


def send_mixtures(
    reports: Report, subset: PublicDataset, memory: chex.ArrayTree, key: chex.PRNGKey, *, pull: float
) -> tuple[chex.Array, chex.ArrayTree]:
    """The server: personal targets [K, M, C], mixtures of the reports."""
    del subset, key
    weights = reports.weights[:, 0]  # the rows of a report count alike
    tiny = jnp.finfo(weights.dtype).tiny  # a round without reports stays finite
    shares = weights / jnp.maximum(weights.sum(), tiny)
    gram = jnp.einsum("kmc,lmc->kl", reports.values, reports.values, precision="highest")
    coefficients = solve_mixture(gram / reports.values[0].size, shares, pull=pull)
    # The ridge problem allows negative coefficients and other sums than 1; targets must be distributions.
    mixture = jnp.maximum(coefficients, 0.0)
    mixture = mixture / jnp.maximum(mixture.sum(axis=1, keepdims=True), tiny)
    return jnp.einsum("kl,lmc->kmc", mixture, reports.values, precision="highest"), memory


def solve_mixture(gram: chex.Array, shares: chex.Array, *, pull: float) -> chex.Array:
    """The coefficients c_n, for each client n, that minimize mse(p_n, sum_m c_nm p_m) + pull * mse(c_n, shares).

    With r = pull / K and G the Gram matrix, (G + r I) c_n = G e_n + r shares, and c_n = e_n - r (G + r I)^-1 (e_n -
    shares), which is exact for large and small pulls.

    Args:
      gram: [K, K], mean over rows and classes of p_n * p_m; zeros for absent clients.
      shares: [K], weights of the clients, of sum 1; 0 for absent clients.
      pull: above 0.

    Returns:
      [K, K], row n for client n; zeros in the columns of absent clients, and `shares` in their rows.

    References:
      Zhang et al. 2021 (arXiv 2111.02862), the update of the knowledge coefficient matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedmd_jax.algorithms.kt_pfl import solve_mixture
      >>> gram = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two send the same
      >>> solve_mixture(gram, jnp.full(3, 1 / 3), pull=1e-3).round(2).tolist()
      [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    present, identity = shares > 0, jnp.eye(len(gram))
    ridge = pull / jnp.maximum(present.sum(), 1)
    solved = jax.scipy.linalg.solve(gram + ridge * identity, identity - shares[:, None], assume_a="pos")
    return jnp.where(present[:, None], identity - ridge * solved.T, shares[None])


def tempered_kl(logits: chex.Array, targets: chex.Array, *, temperature: float) -> chex.Array:
    """T^2 KL(targets || softmax(logits / T)) of each example, for targets that are probabilities at T."""
    return temperature**2 * kl_of_probabilities(logits / temperature, targets)
