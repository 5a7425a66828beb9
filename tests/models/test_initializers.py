import jax
import numpy as np
import pytest

from fedmd_jax.models import initializers


@pytest.mark.parametrize("name", ["glorot_uniform", "he_normal"])
def test_the_numbers_are_those_of_jax(name, key):
    shape = (2, 3, 4, 5)
    got = getattr(initializers, name)(key, shape)
    want = getattr(jax.nn.initializers, name)()(key, shape)
    np.testing.assert_allclose(got, want, atol=1e-6)
