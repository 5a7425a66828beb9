"""Public subsets: which examples of the public dataset a round uses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import check_count, check_numbers
from fedmd_jax.types import PublicDataset


def draw_public_subset(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """Draws a uniformly random subset without replacement, as in the paper.

    Args:
      key: key of the round; every client of the round uses the same subset.
      public: inputs [P, ...] and labels [P] or None.
      size: number of examples M, at most P.

    Returns:
      Inputs [M, ...] and their labels [M] or None.

    Raises:
      ValueError: the size is not from 1 to P, or the arrays do not form a public dataset.

    References:
      Li and Wang 2019, supplement: "a subset of size 5000, randomly selected at each round".

    Example:
      >>> import jax, numpy as np, fedmd_jax as fmd
      >>> public = fmd.public_dataset(np.zeros((5, 2)), labels=np.arange(5))
      >>> subset = fmd.draw_public_subset(jax.random.key(0), public, 3)
      >>> subset.inputs.shape, len(set(subset.labels.tolist()))
      ((3, 2), 3)
    """
    _check_size(public, size)
    return _take(public, jax.random.permutation(key, public.inputs.shape[0])[:size])


def draw_stratified_subset(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """Draws a random subset that keeps the proportions of the classes, as in the released code.

    Args:
      key: key of the round.
      public: inputs [P, ...] and labels [P].
      size: number of examples M, at most P.

    Returns:
      Inputs [M, ...] and labels [M], ordered by class; each class has its proportional number of examples, rounded down
      or up.

    Raises:
      ValueError: as in `draw_public_subset`, or no labels.

    Example:
      >>> import jax, numpy as np, fedmd_jax as fmd
      >>> public = fmd.public_dataset(np.zeros((6, 2)), labels=[0, 1, 0, 1, 1, 1])
      >>> fmd.draw_stratified_subset(jax.random.key(0), public, 3).labels.tolist()
      [0, 1, 1]
    """
    _check_size(public, size)
    if public.labels is None:
        raise ValueError("a stratified subset needs the labels of the public dataset, got none")
    num_rows = public.labels.shape[0]
    # Shuffle within each class, then take examples at even strides from a random start, ordered by class: a class with
    # a fraction p of the examples is taken floor(p * M) or ceil(p * M) times.
    key_order, key_start = jax.random.split(key)
    shuffled = jax.random.permutation(key_order, num_rows)
    by_class = shuffled[jnp.argsort(public.labels[shuffled], stable=True)]
    offset = jax.random.randint(key_start, (), 0, num_rows)
    # floor((i * P + offset) / M); the product is computed on the host, where it cannot overflow.
    whole, rest = np.divmod(np.arange(size) * num_rows, size)
    return _take(public, by_class[whole.astype(np.int32) + (rest.astype(np.int32) + offset) // size])


def first_examples(key: chex.PRNGKey, public: PublicDataset, size: int) -> PublicDataset:
    """Takes the first `size` examples, to replay a run with a given subset.

    Example:
      >>> import jax, numpy as np, fedmd_jax as fmd
      >>> public = fmd.public_dataset(np.zeros((5, 2)), labels=[4, 3, 2, 1, 0])
      >>> fmd.algorithms.first_examples(jax.random.key(0), public, 3).labels.tolist()
      [4, 3, 2]
    """
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
        if public.labels.shape != public.inputs.shape[:1]:  # JAX clamps indices that are out of bounds
            raise ValueError(
                f"as many labels as inputs are needed, got shapes {public.labels.shape} and {public.inputs.shape}"
            )
    check_count("the size of the public subset", size, minimum=0)  # the upper bound is checked below
    if not 1 <= size <= public.inputs.shape[0]:
        raise ValueError(
            f"the public subset must have between 1 and {public.inputs.shape[0]} examples "
            f"(the whole public dataset), got {size}"
        )
