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


def test_a_subset_is_drawn_and_then_changed():
    public = fmd.public_dataset(np.arange(20.0).reshape(10, 1, 1, 2), labels=np.arange(10))
    plain = fmd.algorithms.draw_augmented_subset(
        jax.random.key(0), public, 4, augment=lambda key, inputs: inputs, draw_subset=fmd.algorithms.first_examples
    )
    np.testing.assert_array_equal(plain.inputs, public.inputs[:4])
    assert plain.labels is None
    one, same, other = (fmd.algorithms.draw_augmented_subset(jax.random.key(k), public, 4).inputs for k in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([jnp.zeros((2, 3, 3))], {}, "images must"),
        ([jnp.zeros((2, 3, 3, 1), int)], {}, "images must"),
        ([jnp.zeros((2, 3, 3, 1))], {"angle": -1}, "angle must be finite and not negative"),
        ([jnp.zeros((2, 3, 3, 1))], {"scale": 0}, "scale must be positive"),
        ([jnp.zeros((2, 3, 3, 1))], {"shear": np.inf}, "shear must be finite"),
    ],
)
def test_what_is_refused(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        fmd.algorithms.warp_images(jax.random.key(0), *arguments, **settings)
