"""Selective-FD: clients send the rows of which they are confident, the server drops rows without a clear mean."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm, Sizes, Traffic
from fedmd_jax.algorithms.exchange import Mean, Report, exchange_algorithm, scores_report
from fedmd_jax.checks import check_share
from fedmd_jax.client.losses import at_least_float32, kl_of_probabilities
from fedmd_jax.client.phases import digest
from fedmd_jax.client.scoring import score
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset, TrainingInfo


def selective_fd(*, share: float = 0.75, of_private: bool = False, min_probability: float = 0.0) -> Algorithm:
    """Selective-FD: each client sends its probabilities of some rows, and digests the mean of the rows that are left.

    A client keeps the public rows of which it is most confident; its other rows do not count in the mean. The server
    drops the rows that no client keeps and, with `min_probability`, those whose mean is not clear. A dropped row is in
    no batch of the digest: an epoch has fewer steps, the loss is a mean over rows that are left, and if none is left no
    client changes in the digest.

    The masks and the two selectors are the paper's, the measure of a client is not. The paper estimates the density
    ratio of private to uniform data once (KuLSIF), and keeps the rows above the first quartile of held-out private
    rows. Here it is the probability of the predicted class, anew in each round, and clients have no held-out rows.
    `of_private` takes the quantile of the rows on which the client was trained, of which it is too confident, so that
    few public rows are kept. By default the quantile is therefore that of the public subset.

    Bytes: a client sends [M', C] floats of the M' rows that it keeps and a mask of M bits; [M, C] floats and a mask go
    down. M' is `share` of M, and with `of_private` at most M.

    Args:
      share: share of the public subset that each client keeps. With `of_private`: a client keeps a row if it is at
        least as confident of it as of this share of its private examples, 0.75 for the first quartile.
      of_private: whether the share is one of the private examples, which are then scored in each round.
      min_probability: the server drops rows whose mean has no class of at least this probability; 0 for none. It acts
        from 1 / C on.

    Raises:
      ValueError: an argument is not between 0 and 1.

    References:
      Shao et al., Nature Communications 2024, client-side and server-side selector. The released code multiplies by a
      matrix where its inverse is meant in KuLSIF, has no server-side selector, and reports the best round. A
      re-implementation (SCARLET's) has one with a threshold of 2 for the L1 distance of the mean to its one-hot row,
      2 (1 - largest probability), which is never reached; `min_probability` is that rule with a threshold on the
      probability itself.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.selective_fd(share=0.75), subset_size=100)
      Federation(clients={'small': 2}, algorithm='selective-fd')
    """
    check_share("share", share)
    check_share("min_probability", min_probability)

    def traffic(sizes: Sizes) -> Traffic:
        num_rows, mask = sizes.subset_size, math.ceil(sizes.subset_size / 8)
        num_sent = num_rows if of_private else num_kept(num_rows, share)
        return Traffic(up=4 * num_sent * sizes.num_classes + mask, down=4 * num_rows * sizes.num_classes + mask)

    return exchange_algorithm(
        "selective-fd",
        report=partial(report_confident, share=share, of_private=of_private),
        aggregate=partial(send_clear, min_probability=min_probability),
        digest=digest_kept,
        traffic=traffic,
    )


def report_confident(
    architecture: Architecture,
    state: ClientState,
    subset: PublicDataset,
    private: PrivateDataset,
    *,
    share: float,
    of_private: bool,
) -> Report:
    """The probabilities of the public subset, [M, C], with weight 1 for rows that the client keeps, else 0."""
    scores = scores_report(architecture, state, subset, private).values
    scores = at_least_float32(scores)
    sure = confidence(scores)
    if of_private:
        real = jnp.arange(len(private.labels)) < private.num_examples
        own = score(architecture, state, private.inputs).astype(scores.dtype)
        threshold = jnp.nanquantile(jnp.where(real, confidence(own), jnp.nan), 1 - share, method="higher")
    else:
        threshold = jnp.sort(sure)[len(sure) - num_kept(len(sure), share)]
    # Not `sure >= threshold`: a client with NaN keeps its rows, so that it is excluded, and the metrics say so.
    return Report(jax.nn.softmax(scores), jnp.where(sure < threshold, 0.0, 1.0))


def num_kept(num_rows: int, share: float) -> int:
    """The number of rows that a client keeps of the public subset, at least 1; more only if some are equally sure.

    >>> num_kept(5000, 0.75)
    3750
    """
    return max(1, round(share * num_rows))


def confidence(logits: chex.Array) -> chex.Array:
    """The log odds of the predicted class, [...], of logits [..., C].

    They order rows as its probability does, but do not round to one value for all rows of a confident network.

    >>> confidence(jnp.array([[0.0, 0.0], [30.0, 0.0], [40.0, 0.0]])).tolist()
    [0.0, 30.0, 40.0]
    """
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.max(logits, axis=-1) - jax.nn.logsumexp(jnp.where(predicted, -jnp.inf, logits), axis=-1)


def send_clear(
    mean: Mean, subset: PublicDataset, memory: chex.ArrayTree, key: chex.PRNGKey, *, min_probability: float
) -> tuple[tuple[chex.Array, chex.Array], chex.ArrayTree]:
    """The server: the mean [M, C] and which rows are left, [M], bool."""
    del subset, key
    left = (mean.weights > 0) & (jnp.max(mean.values, axis=-1) >= min_probability)
    return (mean.values, left), memory


def digest_kept(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    targets: tuple[chex.Array, chex.Array],
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
) -> tuple[ClientState, TrainingInfo]:
    """The digest of one client, of the rows that are left: they come first, the others are padding."""
    probabilities, left = targets
    order = jnp.argsort(~left, stable=True)
    rows = inputs[order], probabilities[order]
    how: dict = {"training": training, "distance": kl_of_probabilities, "num_examples": jnp.sum(left)}
    return digest(architecture, state, *rows, key, **how)
