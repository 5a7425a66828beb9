"""The records that travel between the modules, and nothing else.

Shape letters, here and everywhere: K clients of a group, N private examples (padded), M public subset, P public
dataset, C classes, B batch, E epochs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex


def no_penalty(params: chex.ArrayTree) -> float:
    """The default `Architecture.penalty`: nothing is added to any loss."""
    del params
    return 0.0


class Architecture(NamedTuple):
    """One network shape as pure functions: all that the algorithm knows of a network.

    `architecture_from_linen` and `architecture_from_nnx` make one from a Flax module; any other library can provide
    the functions by hand.
    """

    # init(key, inputs [B, ...]) -> (params, model_state). Only the shape and the dtype of `inputs` matter.
    init: Callable[..., tuple[chex.ArrayTree, chex.ArrayTree]]
    # apply(params, model_state, inputs [B, ...], *, train, mask=None, key=None) -> (logits [B, C], model_state).
    # Where `mask` [B] is False a row is padding: it may not reach the model state or the other rows.
    # `key` feeds dropout and is needed when `train` is True.
    apply: Callable[..., tuple[chex.Array, chex.ArrayTree]]
    # penalty(params) -> scalar, added to the digest and to the revisit loss (the reference has L2 on its head).
    penalty: Callable[[chex.ArrayTree], Any] = no_penalty


class ClientState(NamedTuple):
    """One client; a group holds it stacked, so that every leaf gains a leading [K]."""

    params: chex.ArrayTree
    model_state: chex.ArrayTree  # batch statistics; never communicated
    digest_opt_state: chex.ArrayTree  # two optimizers, as in the reference, each with its own memory
    revisit_opt_state: chex.ArrayTree


class TrainingInfo(NamedTuple):
    """What a phase of training reports of one client; a group holds it stacked: every leaf gains a leading [K]."""

    loss: chex.Array  # [E]: mean of each epoch, penalty included; 0 in epochs after early stopping
    num_epochs: chex.Array  # [], int32: epochs that ran, E without early stopping
    finite: chex.Array  # [], bool: False if the phase ended in NaN or infinity; a federation reverts such a client


class TransferInfo(NamedTuple):
    """What transfer learning reports: a `TrainingInfo` for each half, of one client or per group."""

    public: TrainingInfo | dict[str, TrainingInfo]
    private: TrainingInfo | dict[str, TrainingInfo]


class PublicDataset(NamedTuple):
    """What every client can see."""

    inputs: chex.Array  # [P, ...]
    labels: chex.Array | None  # [P], int32; None where the public data is unlabelled


class PrivateDataset(NamedTuple):
    """One client's own examples; a group holds them stacked and padded, so that every leaf gains a leading [K]."""

    inputs: chex.Array  # [N, ...]
    labels: chex.Array  # [N], int32
    num_examples: chex.Array  # [], int32: the first `num_examples` rows are real, the rest is padding


class Attendance(NamedTuple):
    """Who takes part in a round, and how far they get; see `attendance`."""

    available: dict[str, chex.Array]  # per group [K], bool: scores, and hears the consensus
    completed: dict[str, chex.Array]  # per group [K], bool: digest and revisit are kept, too; of those available only


class Participants(NamedTuple):
    """The clients that a call is about, what their scores weigh, and how far they get in this round.

    One record for a whole federation or for a cohort; it may come at run time, so that one compiled round serves any
    cohort of the same size.
    """

    client_ids: dict[str, chex.Array]  # per group [K], uint32: the clients whose states and private data are given
    weights: dict[str, chex.Array]  # per group [K]: of their scores in the consensus
    available: dict[str, chex.Array] | None = None  # as of `Attendance`; None: all of them
    completed: dict[str, chex.Array] | None = None


class RoundInfo(NamedTuple):
    """What a round tells about itself; nothing in it is carried on."""

    digest_loss: dict[str, chex.Array]  # per group [K, E]: epoch means, penalty included; 0 where nobody digested
    revisit_loss: dict[str, chex.Array]  # per group [K, E]
    client_ids: dict[str, chex.Array]  # per group [K]: who could take part
    digested: chex.Array  # [], bool: False when nobody with a weight is heard, and so no client has digested
    attendance: Attendance
    # Per group [K], bool: whether all was finite, be it used or not. What is not finite is not: scores are not heard,
    # after a digest or a revisit the client is as it was before.
    scores_finite: dict[str, chex.Array]
    digest_finite: dict[str, chex.Array]  # True where nobody digested
    revisit_finite: dict[str, chex.Array]
