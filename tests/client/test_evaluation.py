import jax.numpy as jnp
import numpy as np
import toys

import fedmd_jax as fmd


def test_padding_is_ignored(key):
    architecture = toys.linear()
    state = fmd.init_client(architecture, key, jnp.zeros((1, 5)), digest=toys.sgd(4), revisit=toys.sgd(4))
    inputs, labels = toys.examples(0, 11)
    expected = fmd.evaluate(architecture, state, fmd.labelled_dataset(inputs, labels))
    logits = np.asarray(fmd.score(architecture, state, jnp.asarray(inputs)))
    np.testing.assert_allclose(expected.accuracy, (logits.argmax(-1) == labels).mean(), rtol=1e-6)
    junk = fmd.PrivateDataset(
        jnp.pad(inputs, ((0, 9), (0, 0)), constant_values=7.0),
        jnp.pad(jnp.asarray(labels), (0, 9), constant_values=2),
        jnp.int32(11),
    )
    for batch_size in (4, 256):
        padded = fmd.evaluate(architecture, state, junk, batch_size=batch_size)
        np.testing.assert_allclose(padded, expected, rtol=1e-6)
    nobody = fmd.evaluate(architecture, state, junk._replace(num_examples=jnp.int32(0)))
    assert nobody == (0.0, 0.0)
