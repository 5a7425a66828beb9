"""Records shared by all modules.

Shape letters, in all docstrings: K clients of a group, N private examples (padded), M public subset, P public dataset,
C classes, B batch, E epochs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex


def no_penalty(params: chex.ArrayTree) -> float:
    """The default `Architecture.penalty`: zero."""
    del params
    return 0.0


class Architecture(NamedTuple):
    """A network shape as pure functions, which is all that the algorithms need of a network.

    `architecture_from_linen` and `architecture_from_nnx` make one from a Flax module. Networks of other libraries can
    be wrapped by hand.
    """

    #: init(key, inputs [B, ...]) -> (params, model_state). Only the shape and the dtype of `inputs` matter.
    init: Callable[..., tuple[chex.ArrayTree, chex.ArrayTree]]
    #: apply(params, model_state, inputs [B, ...], *, train, mask=None, key=None) -> (logits [B, C], model_state). Rows
    #: with `mask` [B] False are padding: they must not affect the model state or the other rows. `key` is the key of
    #: dropout and required if `train` is True.
    apply: Callable[..., tuple[chex.Array, chex.ArrayTree]]
    #: penalty(params) -> scalar, added to the digest and to the revisit loss (the reference has L2 on its head).
    penalty: Callable[[chex.ArrayTree], Any] = no_penalty


class ClientState(NamedTuple):
    """The state of one client. A group holds it stacked: every leaf gains a leading axis [K]."""

    params: chex.ArrayTree
    model_state: chex.ArrayTree  #: batch statistics; never communicated
    digest_opt_state: chex.ArrayTree  #: two optimizers with a state each, as in the reference
    revisit_opt_state: chex.ArrayTree


class TrainingInfo(NamedTuple):
    """Information on a training phase of one client. A group holds it stacked: every leaf gains a leading axis [K]."""

    loss: chex.Array  #: [E]: mean of each epoch, penalty included; 0 in epochs after early stopping
    num_epochs: chex.Array  #: [], int32: epochs that ran, E without early stopping
    finite: (
        chex.Array
    )  #: [], bool: whether the phase gave no NaN or infinity; if it did, a federation reverts the client


class TransferInfo(NamedTuple):
    """Information on transfer learning: a `TrainingInfo` for each half, of one client or per group."""

    public: TrainingInfo | dict[str, TrainingInfo]
    private: TrainingInfo | dict[str, TrainingInfo]


class PublicDataset(NamedTuple):
    """The dataset that all clients share."""

    inputs: chex.Array  #: [P, ...]
    labels: chex.Array | None  #: [P], int32; None if the public data is unlabelled


class PrivateDataset(NamedTuple):
    """The private dataset of one client. A group holds it stacked and padded: every leaf gains a leading axis [K]."""

    inputs: chex.Array  #: [N, ...]
    labels: chex.Array  #: [N], int32
    num_examples: chex.Array  #: [], int32: the first `num_examples` rows are real, the rest is padding


class Participation(NamedTuple):
    """Which clients take part in a round, and which of them complete it; see `simulation.participation`."""

    available: dict[str, chex.Array]  #: per group [K], bool: scores the public subset; False for dropped clients
    completed: dict[str, chex.Array]  #: per group [K], bool: digest and revisit are kept; False for stragglers


class Participants(NamedTuple):
    """The clients of a call, the weights of their scores, and their participation in the round.

    One record for a whole federation or for a cohort. It may be traced, so that one compiled round serves any cohort of
    the same size.
    """

    client_ids: dict[str, chex.Array]  #: per group [K], uint32: the clients whose states and private data are given
    weights: dict[str, chex.Array]  #: per group [K]: weights of their scores in the consensus
    available: dict[str, chex.Array] | None = None  #: as in `Participation`; None for all of them
    completed: dict[str, chex.Array] | None = None


class RoundInfo(NamedTuple):
    """Information on one round."""

    digest_loss: dict[str, chex.Array]  #: per group [K, E]: epoch means, penalty included; 0 without a digest
    revisit_loss: dict[str, chex.Array]  #: per group [K, E]
    client_ids: dict[str, chex.Array]  #: per group [K]: the candidates of the round
    digested: chex.Array  #: [], bool: False if all clients were excluded from the consensus, so that none digested
    participation: Participation
    #: Per group [K], bool. Non-finite scores are excluded from the consensus; a non-finite digest or revisit is
    #: reverted.
    scores_finite: dict[str, chex.Array]
    digest_finite: dict[str, chex.Array]  #: True without a digest
    revisit_finite: dict[str, chex.Array]
