import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from fedmd_jax.data import center, center_ink, mean_image, scale
from fedmd_jax.data.transform import _without_specks

PIXELS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.just(3), st.just(2), st.just(1)))


@given(PIXELS)
def test_scale_is_division_by_255(pixels):
    images = scale(pixels)
    assert images.dtype == np.float32
    assert images.shape == pixels.shape
    np.testing.assert_array_equal(images, pixels.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(np.rint(images * 255), pixels)


@pytest.mark.parametrize("images", [np.zeros((1, 2, 2, 1), np.float32), np.zeros((1, 2, 2), np.uint8)])
def test_scale_refuses_what_is_scaled_already_or_not_a_set_of_images(images):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, C\], got (float32 \[1, 2, 2, 1\]|uint8)"):
        scale(images)


def test_mean_image_adds_up_in_double_precision():
    images = np.full((100_000, 1, 1, 1), 0.1, np.float32)
    assert mean_image(images).dtype == np.float32
    assert mean_image(images).item() == np.float32(0.1)


@given(PIXELS, PIXELS)
def test_every_set_loses_the_public_mean_and_nothing_else(public, private):
    public, private = scale(public), scale(private)
    public_before, private_before = public.copy(), private.copy()
    centered_public, centered_private = center(public, private)
    mean = public.mean(axis=0)
    np.testing.assert_allclose(centered_public, public - mean, atol=1e-6)
    np.testing.assert_allclose(centered_private, private - mean, atol=1e-6)
    np.testing.assert_allclose(centered_public.mean(axis=0), 0, atol=1e-6)
    assert centered_public.dtype == centered_private.dtype == np.float32
    np.testing.assert_array_equal(public, public_before)
    np.testing.assert_array_equal(private, private_before)


@given(PIXELS, PIXELS)
def test_private_images_do_not_touch_the_public_ones(public, private):
    public, private = scale(public), scale(private)
    np.testing.assert_array_equal(center(public)[0], center(public, private)[0])


def test_an_empty_private_set_is_fine_an_empty_public_one_is_not():
    images = np.ones((2, 3, 3, 1), np.float32)
    assert center(images, images[:0])[1].shape == (0, 3, 3, 1)
    with pytest.raises(ValueError, match=r"with N >= 1 .*, got float32 \[0, 3, 3, 1\]"):
        center(images[:0], images)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (np.ones((2, 4, 3, 1), np.float32), r"images of one shape, got \[4, 3, 1\] beside public \[3, 3, 1\]"),
        (np.ones((2, 3, 3, 3), np.float32), r"images of one shape, got \[3, 3, 3\] beside public \[3, 3, 1\]"),
        (np.ones((2, 3, 3, 1), np.uint8), r"must be floats .*\(see scale\), got uint8 \[2, 3, 3, 1\]"),
        (np.ones((3, 3, 1), np.float32), r"must be floats .*, got float32 \[3, 3, 1\]"),
    ],
)
def test_sets_that_do_not_fit_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        center(np.ones((2, 3, 3, 1), np.float32), others)


GREYS = st.sampled_from([0, 0, 0, 0, 5, 40, 255])
INK = hnp.arrays(np.uint8, (28, 28), elements=st.sampled_from([0, 0, 0, 255]))


@given(INK)
def test_centred_ink_has_the_size_of_a_digit_and_its_mass_in_the_middle(image):
    centred = center_ink(image[None, :, :, None])[0, :, :, 0]
    assert centred.shape == image.shape
    if not image.any():
        assert not centred.any()
        return
    rows, columns = (np.flatnonzero(centred.any(axis=axis)) for axis in (1, 0))
    assert max(np.ptp(rows), np.ptp(columns)) <= 20
    for axis in (0, 1):
        weight = centred.astype(float).sum(axis=1 - axis)
        if weight.sum() > 0:
            assert abs(np.average(np.arange(28), weights=weight) - 13.5) <= 6.5  # as near as the border lets it


def test_centred_ink_does_not_depend_on_where_it_was_written():
    image = np.zeros((28, 28), np.uint8)
    image[3:9, 4:8] = np.random.default_rng(0).integers(32, 256, (6, 4))
    moved = np.roll(image, (11, 5), (0, 1))
    both = center_ink(np.stack([image, moved])[..., None])
    np.testing.assert_array_equal(both[0], both[1])


def test_a_halo_is_no_ink():
    image = np.zeros((28, 28), np.uint8)
    image[10:16, 12:15] = 200
    halo = image.copy()
    halo[6:20, 8:19] = np.maximum(halo[6:20, 8:19], 5)
    both = center_ink(np.stack([image, halo])[..., None])
    np.testing.assert_array_equal(both[0], both[1])
    assert np.ptp(np.flatnonzero((both[0] > 127).any(axis=1))) >= 18


def test_ink_has_one_channel():
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 1\], got uint8 \[1, 2, 2, 3\]"):
        center_ink(np.zeros((1, 2, 2, 3), np.uint8))


def parts_of(image):
    """Sets of pixels that touch at edges or corners, one after the other."""
    left, parts = set(zip(*map(np.ndarray.tolist, np.nonzero(image)), strict=True)), []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(part)
    return parts


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), elements=GREYS))
def test_small_parts_are_specks(images):
    expected = images.copy()
    for image in expected:
        ink = {frozenset(part): sum(int(image[pixel]) for pixel in part) for part in parts_of(image)}
        for part in ink:
            if ink[part] < 0.1 * max(ink.values()):
                for pixel in part:
                    image[pixel] = 0
    np.testing.assert_array_equal(_without_specks(images), expected)


@given(st.integers(0, 27), st.integers(0, 27), st.integers(32, 255), st.sampled_from([1, 6]))
def test_a_speck_moves_no_letter_and_a_stroke_does(row, column, grey, size):
    letter = np.zeros((28, 28), np.uint8)
    letter[9:19, 10:13] = 200
    other = letter.copy()
    other[row : row + size, column : column + size] = grey
    if len(parts_of(other)) == 1:  # it touches the letter
        return
    alone, both = center_ink(np.stack([letter, other])[..., None])
    is_speck = int(other.sum()) - int(letter.sum()) < 0.1 * letter.sum()
    assert np.array_equal(alone, both) == is_speck
