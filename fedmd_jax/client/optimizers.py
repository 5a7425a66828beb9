"""The optimizer of the reference, and what the state of any optax optimizer needs to belong to one client."""

import chex
import jax
import jax.numpy as jnp
import optax


def adam(
    learning_rate: float = 1e-3, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam as in Keras, which the released code uses: `eps` is added before the bias correction.

    optax adds it after the correction (this is the "epsilon hat" of section 2 of the paper). The two differ for
    gradients as small as `eps`, most of all in the first steps: by 1.6e-3 in a revisit loss of the reference's first
    round.

    Args:
      learning_rate: step size.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: added to the denominator.

    Returns:
      An optax optimizer; its state is that of `optax.scale_by_adam`.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014, end of section 2.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> optimizer = fmd.adam(0.1)
      >>> params = jnp.array([1.0])
      >>> updates, _ = optimizer.update(jnp.array([3.0]), optimizer.init(params), params)
      >>> round(float(updates[0]), 4)
      -0.1
    """

    def init(params: chex.ArrayTree) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)  # two buffers, to be donated
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        # `lax.pow` takes an integer exponent, also if dtypes are not promoted; 1.0, since a rate may be an integer.
        step = learning_rate * jnp.sqrt(1 - jax.lax.pow(1.0 * b2, count)) / (1 - jax.lax.pow(1.0 * b1, count))
        updates = jax.tree.map(lambda m, v: -step * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_updates(optimizer: optax.GradientTransformation, factor: chex.Numeric) -> optax.GradientTransformation:
    """The optimizer with all its updates multiplied by a factor; its state is the same.

    For an optimizer whose last step is to multiply by its learning rate this is a factor of the learning rate.

    Args:
      optimizer: any optax optimizer.
      factor: [], may be traced.

    Raises:
      ValueError: the factor is not one number.

    >>> optimizer = scale_updates(optax.sgd(0.5), 0.25)
    >>> updates, _ = optimizer.update(jnp.array(8.0), optimizer.init(jnp.array(0.0)))
    >>> float(updates)
    -1.0
    """
    if jnp.shape(factor) != ():
        raise ValueError(f"the factor of the learning rate must be one number, got shape {jnp.shape(factor)}")
    with_extra = optax.with_extra_args_support(optimizer)

    def update(*arguments, **named):
        updates, state = with_extra.update(*arguments, **named)
        return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def init_optimizer(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, key: chex.PRNGKey
) -> chex.ArrayTree:
    """A fresh optimizer state of one client, in which random keys are the client's own.

    An optimizer such as `optax.add_noise` has one key for all; clients that share it would draw the same noise.

    Args:
      optimizer: any optax optimizer.
      params: of the client.
      key: of the client, such as `fold_in(key, client_id)`; not consumed.

    Returns:
      The state. Typed keys of JAX's default generator are stored as their words, uint32, like any other array.

    Raises:
      ValueError: the optimizer is `optax.lookahead`, which wants parameters of its own type.

    >>> noisy = optax.add_noise(1.0, 0.0, key=7)
    >>> first, second = (init_optimizer(noisy, jnp.zeros(2), jax.random.key(client)) for client in (0, 1))
    >>> bool((first.rng_key == second.rng_key).all())
    False
    """

    def own(leaf):
        if not is_key(leaf):
            return leaf
        for word in jax.random.key_data(key).reshape(-1):
            leaf = jax.random.fold_in(leaf, word)
        typed = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if typed and leaf.dtype == jax.random.key(0).dtype else leaf

    opt_state = optimizer.init(params)
    if any(_is_lookahead(node) for node in jax.tree.leaves(opt_state, is_leaf=_is_lookahead)):
        raise ValueError("optax.lookahead trains two copies of the parameters, of which a client has one: use another")
    return jax.tree.map(own, opt_state)


def _is_lookahead(node):
    return isinstance(node, optax.LookaheadState)


def is_key(leaf: chex.Array) -> bool:
    """Whether an array of an optimizer state is one random key, typed or as two or four words of uint32."""
    dtype = jnp.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.shape(leaf) == ()
    return dtype == jnp.uint32 and jnp.shape(leaf) == jax.random.key_data(jax.random.key(0)).shape


def with_hyperparameters_of(
    optimizer: optax.GradientTransformation, opt_state: chex.ArrayTree, params: chex.ArrayTree
) -> chex.ArrayTree:
    """An optimizer state with the hyperparameters of `optimizer`, if the state has any.

    `optax.inject_hyperparams` keeps them in the state, in a field `hyperparams`, and `update` takes them from there. A
    state that another phase made or has used would train with the hyperparameters of that phase.

    Args:
      optimizer: the one that is about to train.
      opt_state: of this optimizer, or of one that differs in its hyperparameters.
      params: of the client.

    Raises:
      ValueError: the state belongs to an optimizer of another kind.

    >>> fast, slow = (optax.inject_hyperparams(optax.sgd)(rate) for rate in (0.5, 0.125))
    >>> state = with_hyperparameters_of(fast, slow.init(jnp.zeros(2)), jnp.zeros(2))
    >>> float(state.hyperparams["learning_rate"])
    0.5
    """
    fresh = optimizer.init(params)
    if jax.tree.structure(fresh) != jax.tree.structure(opt_state):  # type: ignore[operator]  # jax types it as nothing
        raise ValueError("the optimizer state of the client belongs to an optimizer of another kind")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, own: own if is_hyperparameter(path) else leaf, opt_state, fresh
    )


def is_hyperparameter(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf of an optimizer state is a hyperparameter that `optax.inject_hyperparams` keeps there."""
    return any(getattr(entry, "name", None) == "hyperparams" for entry in path)
