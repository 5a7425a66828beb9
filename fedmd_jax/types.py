"""Records shared by all modules.

Shape letters, in all docstrings: K clients of a group, N private examples (padded), M public subset, P public dataset,
C classes, B batch, E epochs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import chex


def no_penalty(params: chex.ArrayTree) -> float:
    """The default `Architecture.penalty`: zero.

    Example:
      >>> from fedmd_jax.types import no_penalty
      >>> no_penalty({"kernel": [1.0, 2.0]})
      0.0
    """
    del params
    return 0.0


class Architecture(NamedTuple):
    """A network shape as pure functions, which is all that the algorithms need of a network.

    `architecture_from_linen` and `architecture_from_nnx` make one from a Flax module. Networks of other libraries can
    be wrapped by hand.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> def init(key, inputs):
      ...     return {"kernel": jax.random.normal(key, (inputs.shape[1], 3))}, {}
      >>> def apply(params, model_state, inputs, *, train, mask=None, key=None):
      ...     return inputs @ params["kernel"], model_state
      >>> linear = fmd.Architecture(init, apply)
      >>> params, model_state = linear.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> linear.apply(params, model_state, jnp.ones((5, 4)), train=False)[0].shape
      (5, 3)
    """

    #: `(key, inputs [B, ...]) -> (params, model_state)`. Only the shape and the dtype of `inputs` matter.
    init: Callable[..., tuple[chex.ArrayTree, chex.ArrayTree]]
    #: `(params, model_state, inputs [B, ...], *, train, mask=None, key=None) -> (logits [B, C], model_state)`. Rows
    #: with `mask` [B] False are padding and must not affect the model state or the other rows. `key` is the key of
    #: dropout and required if `train` is True.
    apply: Callable[..., tuple[chex.Array, chex.ArrayTree]]
    #: `(params) -> scalar`, added to the digest and to the revisit loss (the reference has L2 on its head).
    penalty: Callable[[chex.ArrayTree], Any] = no_penalty
    #: As `apply`, with `(logits [B, C], features [B, D])` in the place of the logits, for FedProto and FedTGP; None if
    #: the network has none. The adapters take what a network has sown as "features". If you replace `apply`, replace
    #: it, too.
    features: Callable[..., tuple[tuple[chex.Array, chex.Array], chex.ArrayTree]] | None = None
    #: `(params, model_state, inputs [B, ...], *, mask=None) -> model_state` whose batch statistics are those of this
    #: batch, without dropout; None if it is not known how to compute them. See `estimate_statistics`.
    statistics: Callable[..., chex.ArrayTree] | None = None


class ClientState(NamedTuple):
    """The state of one client. A group holds it stacked: every leaf gains a leading axis [K].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> client = fmd.ClientState({"kernel": jnp.ones((4, 3))}, {}, (), ())  # without optimizers, for scores only
      >>> client.params["kernel"].shape
      (4, 3)
    """

    params: chex.ArrayTree  #: parameters of the network
    model_state: chex.ArrayTree  #: batch statistics; only algorithms that average parameters send them
    digest_opt_state: chex.ArrayTree  #: state of the optimizer of the digests
    revisit_opt_state: chex.ArrayTree  #: state of the optimizer of private training, another one as in the reference


States = Mapping[str, ClientState]  # of all groups, stacked


class FederationState(NamedTuple):
    """All clients and what the server remembers between rounds, for algorithms in which it remembers something.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> clients = {"a": fmd.ClientState(jnp.zeros((2, 4, 3)), {}, (), ())}
      >>> states = fmd.FederationState(clients, memory=jnp.zeros(3), model=())
      >>> states.clients["a"].params.shape
      (2, 4, 3)
    """

    clients: States  #: per group, stacked clients [K, ...]
    memory: chex.ArrayTree  #: arrays of fixed shapes, of the algorithm; () if it remembers nothing
    model: Any  #: the `ClientState` of the server's own network; () if it has none


class TrainingInfo(NamedTuple):
    """Information on a training phase of one client. A group holds it stacked: every leaf gains a leading axis [K].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> info = fmd.TrainingInfo(loss=jnp.array([0.75, 0.5]), num_epochs=jnp.int32(2), finite=jnp.array(True))
      >>> info.loss[-1].item(), int(info.num_epochs)
      (0.5, 2)
    """

    loss: chex.Array  #: [E]: mean of each epoch, penalty included; 0 in epochs after early stopping
    num_epochs: chex.Array  #: [], int32: epochs that ran, E without early stopping
    finite: chex.Array  #: [], bool: False if the phase gave NaN or infinity; a federation then reverts the client


_Info = TypeVar("_Info", TrainingInfo, Mapping[str, TrainingInfo])


class TransferInfo(NamedTuple, Generic[_Info]):
    """Information on transfer learning: a `TrainingInfo` for each half, of one client or per group.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> public = fmd.TrainingInfo(jnp.array([0.75, 0.5]), jnp.int32(2), jnp.array(True))
      >>> private = fmd.TrainingInfo(jnp.array([0.25]), jnp.int32(1), jnp.array(True))
      >>> info = fmd.TransferInfo(public, private)
      >>> info.public.loss.tolist(), info.private.loss.tolist()
      ([0.75, 0.5], [0.25])
    """

    public: _Info  #: of the half on the public dataset
    private: _Info  #: of the half on the private dataset


class PublicDataset(NamedTuple):
    """The dataset that all clients share.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> public = fmd.PublicDataset(inputs=jnp.zeros((10, 28, 28, 1)), labels=None)
      >>> public.inputs.shape
      (10, 28, 28, 1)

      `public_dataset` makes one of arrays of any kind, after checks.
    """

    inputs: chex.Array  #: [P, ...]
    labels: chex.Array | None  #: [P], int32; None if the public data is unlabelled


class PrivateDataset(NamedTuple):
    """The private dataset of one client. A group holds it stacked and padded: every leaf gains a leading axis [K].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> private = fmd.PrivateDataset(jnp.zeros((3, 4)), jnp.array([0, 1, 1]), jnp.int32(2))  # one row of padding
      >>> private.labels[: private.num_examples].tolist()
      [0, 1]

      `labelled_dataset` makes one of arrays of any kind; `stack_private` makes those of all clients.
    """

    inputs: chex.Array  #: [N, ...]
    labels: chex.Array  #: [N], int32
    num_examples: chex.Array  #: [], int32: the first `num_examples` rows are real, the rest is padding


class Participation(NamedTuple):
    """Which clients take part in a round, and which of them complete it; see `simulation.participation`.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> available = {"a": jnp.array([True, True, False])}  # the third client is dropped
      >>> completed = {"a": jnp.array([True, False, False])}  # the second one is a straggler
      >>> fmd.Participation(available, completed).completed["a"].tolist()
      [True, False, False]
    """

    available: dict[str, chex.Array]  #: per group [K], bool: scores the public subset; False for dropped clients
    completed: dict[str, chex.Array]  #: per group [K], bool: digest and revisit are kept; False for stragglers


class Participants(NamedTuple):
    """The clients of a call, the weights of their scores, and their participation in the round.

    One record for a whole federation or for a cohort. It may be traced, so that one compiled round serves any cohort of
    the same size.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> participants = fmd.Participants({"a": jnp.array([3, 8])}, {"a": jnp.array([1.0, 2.0])})
      >>> participants.weights["a"].tolist(), participants.available
      ([1.0, 2.0], None)
    """

    client_ids: dict[str, chex.Array]  #: per group [K], uint32: the clients whose states and private data are given
    weights: dict[str, chex.Array]  #: per group [K]: weights of their scores in the consensus
    available: dict[str, chex.Array] | None = None  #: as in `Participation`; None for all of them
    completed: dict[str, chex.Array] | None = None  #: as in `Participation`; None for all of them


class RoundInfo(NamedTuple):
    """Information on one round.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> yes, loss = {"a": jnp.array([True, True])}, {"a": jnp.array([[0.5], [0.25]])}  # two clients, one epoch
      >>> ids, present = {"a": jnp.array([0, 1])}, fmd.Participation(yes, yes)
      >>> info = fmd.RoundInfo(loss, loss, ids, jnp.array(True), present, yes, yes, yes)  # as a round returns it
      >>> info.digest_loss["a"][:, -1].tolist(), bool(info.scores_finite["a"].all())
      ([0.5, 0.25], True)
    """

    digest_loss: Mapping[str, chex.Array]  #: per group [K, E]: epoch means; E = 0 if the algorithm has no digest
    revisit_loss: Mapping[str, chex.Array]  #: per group [K, E]
    client_ids: dict[str, chex.Array]  #: per group [K]: the candidates of the round
    digested: chex.Array  #: [], bool: False if all clients were excluded from the consensus, so that none digested
    participation: Participation  #: of these clients
    #: Per group [K], bool. Non-finite scores are excluded from the consensus; a non-finite digest or revisit is
    #: reverted.
    scores_finite: Mapping[str, chex.Array]
    digest_finite: Mapping[str, chex.Array]  #: True without a digest
    revisit_finite: Mapping[str, chex.Array]  #: False if the client was reverted
    #: []: mean distance of a score of the consensus from the mean over the classes of its example; None without a
    #: consensus of scores. If it grows from round to round, accuracies may fall: see `estimate_statistics`.
    consensus_size: chex.Array | None = None
