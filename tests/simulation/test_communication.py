import jax
import jax.numpy as jnp
import pytest
import toys

import fedmd_jax as fmd


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2), (jnp.int8, 1)])
def test_the_released_setting(dtype, size):
    groups = toys.groups()
    states = jax.eval_shape(_init(groups))
    counted = fmd.communication_bytes(states, subset_size=5000, num_classes=16, num_rounds=20, dtype=dtype)
    assert counted.upload_bytes_per_client_round == counted.download_bytes_per_client_round == 5000 * 16 * size
    assert counted.total_bytes == 2 * 20 * 5 * 5000 * 16 * size
    linear, mlp = 4 * (5 * 4 + 4), 4 * (5 * 6 + 6 * 4)
    assert counted.fedavg_bytes_per_client_round == (3 * linear + 2 * mlp) / 5


def test_batch_statistics_are_part_of_what_fedavg_sends():
    groups = {"normed": fmd.ArchitectureGroup(toys.normed(), (0,))}
    counted = fmd.communication_bytes(jax.eval_shape(_init(groups)), subset_size=1, num_classes=4, num_rounds=0)
    assert counted.fedavg_bytes_per_client_round == 4 * (5 * 4 + 4) + 4 * (5 + 1)
    assert counted.total_bytes == 0


def _init(groups):
    return lambda: {
        name: jax.vmap(
            lambda key, group=group: fmd.init_client(
                group.architecture, key, jnp.zeros((1, 5)), digest=toys.sgd(1), revisit=toys.sgd(1)
            )
        )(fmd.mapping.client_keys(jax.random.key(0), group.client_ids))
        for name, group in groups.items()
    }
