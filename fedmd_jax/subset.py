"""Which part of the public dataset a round talks about."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import check_count, check_numbers
from fedmd_jax.types import PublicDataset


def draw_public_subset(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """A uniformly random subset without repetition, as in the paper.

    Args:
      key: the round's; every client of the round sees the same subset.
      public: [P, ...].
      size: M, at most P.

    Returns:
      Inputs [M, ...] and their labels [M], if there are any.

    Raises:
      ValueError: a size that the public dataset cannot give, or arrays that are none of such a dataset.

    References:
      Li and Wang 2019, supplement: "a subset of size 5000, randomly selected at each round".
    """
    _check_size(public, size)
    return _take(public, jax.random.permutation(key, public.inputs.shape[0])[:size])


def draw_stratified_subset(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """A random subset in which every class keeps its share, as in the released code.

    Args:
      key: the round's.
      public: [P, ...], labelled.
      size: M, at most P.

    Returns:
      Inputs [M, ...] and labels [M], ordered by class; each class has its exact share, rounded down or up.

    Raises:
      ValueError: as in `draw_public_subset`, or no labels.
    """
    _check_size(public, size)
    if public.labels is None:
        raise ValueError("a stratified subset needs the labels of the public dataset, got none")
    num_rows = public.labels.shape[0]
    # Shuffle within each class, then walk through the classes in even strides from a random start: a class that fills
    # a share p of the walk is met floor(p * M) or ceil(p * M) times.
    key_order, key_start = jax.random.split(key)
    shuffled = jax.random.permutation(key_order, num_rows)
    by_class = shuffled[jnp.argsort(public.labels[shuffled], stable=True)]
    offset = jax.random.randint(key_start, (), 0, num_rows)
    # floor((i * P + offset) / M), the product taken on the host where it cannot overflow.
    whole, rest = np.divmod(np.arange(size) * num_rows, size)
    return _take(public, by_class[whole.astype(np.int32) + (rest.astype(np.int32) + offset) // size])


def take_in_order(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """The first `size` rows: for replaying a run whose subset is given."""
    del key
    _check_size(public, size)
    return _take(public, jnp.arange(size))


def _take(public, rows):
    return PublicDataset(public.inputs[rows], None if public.labels is None else public.labels[rows])


def _check_size(public, size):
    check_numbers("public inputs", public.inputs)
    if not public.inputs.shape:
        raise ValueError("public inputs must have shape [P, ...], got ()")
    if public.labels is not None:
        check_numbers("public labels", public.labels, kind=jnp.integer)
        if public.labels.shape != public.inputs.shape[:1]:  # JAX would take some row where there is none
            raise ValueError(
                f"as many labels as inputs are needed, got shapes {public.labels.shape} and {public.inputs.shape}"
            )
    check_count("the size of the public subset", size, minimum=0)  # more of it below
    if not 1 <= size <= public.inputs.shape[0]:
        raise ValueError(
            f"the public subset must have between 1 and {public.inputs.shape[0]} examples "
            f"(the whole public dataset), got {size}"
        )
