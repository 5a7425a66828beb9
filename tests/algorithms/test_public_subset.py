import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd

LABELS = jnp.asarray([0] * 10 + [1] * 25 + [2] * 7 + [3] * 1)
PUBLIC = fmd.PublicDataset(jnp.arange(43.0)[:, None], LABELS)
SIZES = st.sampled_from([1, 10, 29, 43])  # few, since each is compiled
DRAWS = [fmd.draw_public_subset, fmd.draw_stratified_subset, fmd.algorithms.first_examples]


@pytest.mark.parametrize("draw", DRAWS)
@given(size=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_rows_are_distinct_and_keep_their_labels(draw, size, seed):
    subset = draw(jax.random.key(seed), PUBLIC, size)
    rows = np.asarray(subset.inputs)[:, 0].astype(int)
    assert len(set(rows)) == size
    np.testing.assert_array_equal(subset.labels, LABELS[rows])


@pytest.mark.parametrize("draw", DRAWS[:2])
def test_the_subset_depends_on_the_key(draw):
    one, same, other = (draw(jax.random.key(k), PUBLIC, 20).inputs for k in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


@given(size=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_stratified_classes_keep_their_share(size, seed):
    subset = fmd.draw_stratified_subset(jax.random.key(seed), PUBLIC, size)
    counts = np.bincount(subset.labels, minlength=4)
    share = np.bincount(LABELS) * size / 43
    assert (np.floor(share) <= counts).all()
    assert (counts <= np.ceil(share)).all()


def test_stratified_draws_every_row_equally_often():
    draw = jax.jit(jax.vmap(lambda key: fmd.draw_stratified_subset(key, PUBLIC, 11).inputs[:, 0]))
    rows = np.asarray(draw(jax.random.split(jax.random.key(0), 4000))).astype(int)
    frequency = np.bincount(rows.ravel(), minlength=43) / 4000
    np.testing.assert_allclose(frequency, 11 / 43, atol=0.035)  # five standard deviations


def test_unlabelled_public_data_can_be_drawn_from_but_not_stratified():
    unlabelled = PUBLIC._replace(labels=None)
    assert fmd.draw_public_subset(jax.random.key(0), unlabelled, 5).labels is None
    with pytest.raises(ValueError, match="needs the labels"):
        fmd.draw_stratified_subset(jax.random.key(0), unlabelled, 5)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("size", [0, 44])
def test_a_subset_larger_than_the_dataset_or_empty_is_refused(draw, size):
    with pytest.raises(ValueError, match=f"between 1 and 43 .* got {size}"):
        draw(jax.random.key(0), PUBLIC, size)
