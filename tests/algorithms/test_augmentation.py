import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import fedmd_jax as fmd

NUM_IMAGES, HEIGHT, WIDTH = 6, 21, 17
ROWS, COLUMNS = np.meshgrid(np.arange(HEIGHT) - 10.0, np.arange(WIDTH) - 8.0, indexing="ij")
CENTER = np.array([10.0, 8.0])


def images(seed=0):
    """Noise, and in two more channels the position of each pixel, from which the map of an image can be read."""
    noise = np.random.default_rng(seed).normal(size=(NUM_IMAGES, HEIGHT, WIDTH, 1))
    positions = np.broadcast_to(np.stack([ROWS, COLUMNS], -1), (NUM_IMAGES, HEIGHT, WIDTH, 2))
    return np.concatenate([noise, positions], -1).astype(np.float32)


def maps(warped):
    """The matrix [2, 2] of each image, from its positions around the centre, which are not cut off."""
    at = warped[:, :, :, 1:]
    return np.stack([at[:, 11, 8] - at[:, 9, 8], at[:, 10, 9] - at[:, 10, 7]], -1) / 2


@pytest.mark.parametrize("seed", range(3))
def test_a_warp_is_the_affine_map_of_scipy(seed):
    given = images(seed)
    warped = np.asarray(jax.jit(fmd.algorithms.warp_images)(jax.random.key(seed), given))
    assert len({matrix.tobytes() for matrix in maps(warped)}) == NUM_IMAGES
    for image, matrix, found in zip(given, maps(warped), warped, strict=True):
        offset = CENTER - matrix @ CENTER
        for channel in range(3):
            wanted = scipy.ndimage.affine_transform(image[..., channel], matrix, offset, order=1, mode="nearest")
            np.testing.assert_allclose(found[..., channel], wanted, atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "turns", "stretches"),
    [
        ({"angle": 20, "scale": 1, "shear": 0}, 20, 1.0),
        ({"angle": 0, "scale": 1.3, "shear": 0}, 0, 1.3),
        ({"angle": 0, "scale": 1 / 1.3, "shear": 0}, 0, 1.3),
    ],
)
def test_amounts_are_within_their_bounds_and_differ(settings, turns, stretches):
    warped = fmd.algorithms.warp_images(jax.random.key(0), images(), **settings)
    matrices = maps(np.asarray(warped))
    sizes = np.linalg.norm(matrices, axis=1)  # of the columns: scales of the height and of the width
    angles = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert (np.abs(angles) <= turns + 1e-3).all()
    assert ((sizes <= stretches + 1e-5) & (sizes >= 1 / stretches - 1e-5)).all()
    assert np.abs(angles).max() >= turns / 4
    assert np.abs(np.log(sizes)).max() >= np.log(stretches) / 4
    if stretches > 1:
        assert (np.abs(np.log(sizes[:, 0] / sizes[:, 1])) > 1e-3).all()


def test_a_shear_moves_along_the_height_only():
    warped = fmd.algorithms.warp_images(jax.random.key(0), images(), angle=0, scale=1, shear=0.3)
    matrices = maps(np.asarray(warped))
    np.testing.assert_allclose(
        matrices[:, [0, 1, 1], [0, 0, 1]], np.broadcast_to([1, 0, 1], (NUM_IMAGES, 3)), atol=1e-5
    )
    assert 0.05 < np.abs(matrices[:, 0, 1]).max() <= 0.3 + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_image_has_one_side_of_each_of_two_images(seed):
    numbers = jnp.arange(NUM_IMAGES, dtype=jnp.float32)
    given = jnp.broadcast_to(numbers[:, None, None, None], (NUM_IMAGES, HEIGHT, WIDTH, 2))
    cut = np.asarray(fmd.algorithms.cut_images(jax.random.key(seed), given))
    partners = []
    for number, image in enumerate(cut):
        (other,) = set(image.ravel().tolist()) - {number} or {number}
        partners.append(other)
        if other != number:
            kept = image[:, :, 0] == number
            np.testing.assert_array_equal(image[:, :, 0], image[:, :, 1])
            assert 0 < kept.mean() <= 0.5
            for lines in (kept, kept.T):  # a half plane starts or ends once in a line
                assert (np.abs(np.diff(lines.astype(int), axis=1)).sum(axis=1) <= 1).all()
    assert sorted(partners) == list(range(NUM_IMAGES))


def test_cuts_differ():
    given = jnp.stack([jnp.zeros((8, 8, 1))] * 10 + [jnp.ones((8, 8, 1))] * 10)
    cut = np.asarray(fmd.algorithms.cut_images(jax.random.key(0), given))
    assert len({image.tobytes() for image in cut}) > 5


def test_a_subset_is_drawn_and_then_changed():
    public = fmd.public_dataset(np.arange(20.0).reshape(10, 1, 1, 2), labels=np.arange(10))
    changes = [lambda key, inputs: inputs + 1, lambda key, inputs: inputs * 2]
    found = fmd.algorithms.draw_augmented_subset(
        jax.random.key(0), public, 4, augmentations=changes, draw_subset=fmd.algorithms.first_examples
    )
    np.testing.assert_array_equal(found.inputs, 2 * (public.inputs[:4] + 1))
    assert found.labels is None
    one, same, other = (fmd.algorithms.draw_augmented_subset(jax.random.key(k), public, 4).inputs for k in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize("augment", [fmd.algorithms.warp_images, fmd.algorithms.cut_images])
@pytest.mark.parametrize("images", [jnp.zeros((2, 3, 3)), jnp.zeros((2, 3, 3, 1), int)])
def test_only_images_are_changed(augment, images):
    with pytest.raises(ValueError, match=r"images that are .* must"):
        augment(jax.random.key(0), images)


def test_half_precision_is_kept():
    given = jnp.linspace(0, 1, 128, dtype=jnp.bfloat16).reshape(2, 8, 8, 1)
    for augment in (fmd.algorithms.warp_images, fmd.algorithms.cut_images):
        assert augment(jax.random.key(0), given).dtype == jnp.bfloat16
    warped = fmd.algorithms.warp_images(jax.random.key(0), given)
    wanted = fmd.algorithms.warp_images(jax.random.key(0), given.astype(jnp.float32))
    np.testing.assert_array_equal(warped, wanted.astype(jnp.bfloat16))  # positions are not rounded


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"angle": -1}, "finite and not negative"), ({"scale": 0}, "positive"), ({"shear": np.inf}, "finite")],
)
def test_impossible_amounts_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be {message}"):
        fmd.algorithms.warp_images(jax.random.key(0), jnp.zeros((2, 3, 3, 1)), **settings)
