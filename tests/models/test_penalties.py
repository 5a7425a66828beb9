import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.models import head_l2


def test_head_l2_sees_the_head_only_and_has_no_half():
    params = {"head": {"kernel": jnp.array([[1.0, -2.0]])}, "conv1": {"kernel": jnp.array([5.0])}}
    gradient = jax.grad(head_l2(0.1))(params)
    np.testing.assert_allclose(gradient["head"]["kernel"], [[0.2, -0.4]], rtol=1e-6)
    assert gradient["conv1"]["kernel"] == 0


def test_mistakes():
    with pytest.raises(ValueError, match="scale must not be negative, got -1"):
        head_l2(-1)
