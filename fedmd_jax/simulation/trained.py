"""Trained clients outside of a federation: one client with its network, and the ensemble of several."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import check_inputs
from fedmd_jax.client.scoring import score
from fedmd_jax.data.transform import center_ink, scale
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.mapping.sharding import fetch_to_host, gather_clients, group_sizes
from fedmd_jax.simulation.federation import States, check_not_donated
from fedmd_jax.types import Architecture, ClientState

_score = jax.jit(score, static_argnums=0, static_argnames="batch_size")


class Preprocessing(NamedTuple):
    """From the pixels of images to inputs of a network: `images / 255 - mean`; a function of the images.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> preprocess = fmd.simulation.Preprocessing(mean=np.full((1, 1, 1), 0.5, np.float32))
      >>> preprocess(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)).ravel().tolist()
      [-0.5, 0.5]
    """

    mean: np.ndarray  #: mean image of the public dataset, [H, W, channels], of pixels from 0 to 1
    center_ink: bool = False  #: whether `center_ink` comes first, as for the letters of LEAF

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Converts images, [N, H, W, channels], uint8, to inputs, [N, H, W, channels], float32."""
        return scale(center_ink(images) if self.center_ink else images) - self.mean

    def to_record(self) -> dict[str, Any]:
        """The same as JSON content: `center_ink`, then `divide_by` 255, then `subtract` the mean image."""
        return {"center_ink": self.center_ink, "divide_by": 255, "subtract": self.mean.tolist()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_record`."""
        return cls(np.asarray(record["subtract"], np.float32), record["center_ink"])


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class TrainedClient:
    """One client: its network and what it has learned.

    The functions of `client` take its parts, as in `revisit(client.architecture, client.state, ...)`.

    Attributes:
      client_id: the id in the federation.
      name: name of the architecture group.
      architecture: the network.
      state: parameters, batch statistics and optimizer states, as NumPy arrays.
      inputs: shape [1, ...] and dtype of inputs.
      preprocess: from images, uint8, to inputs; None if it is not known.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedmd_jax as fmd
      >>> from fedmd_jax.models import MLP
      >>> network = fmd.architecture_from_linen(MLP((8,), num_classes=3))
      >>> federation = fmd.fedmd({"mlp": fmd.ArchitectureGroup(network, client_ids=(0, 1, 2))})
      >>> inputs = jnp.ones((5, 4))
      >>> states = federation.new_states(jax.random.key(0), inputs)  # and training
      >>> client = fmd.trained_clients(federation.groups, states, inputs)[2]
      >>> client
      TrainedClient(client_id=2, name='mlp', inputs=float32[N, 4])
      >>> client.predict(inputs).shape, client.probabilities(inputs).shape
      ((5,), (5, 3))
    """

    client_id: int
    name: str
    architecture: Architecture
    state: ClientState
    inputs: jax.ShapeDtypeStruct
    preprocess: Callable[[np.ndarray], np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"TrainedClient(client_id={self.client_id}, name={self.name!r}, inputs={_describe(self.inputs)})"

    @property
    def params(self) -> chex.ArrayTree:
        """The parameters of the network."""
        return self.state.params

    @property
    def num_classes(self) -> int:
        """C, the number of scores of an example."""
        return jax.eval_shape(partial(score, self.architecture), self.state, self.inputs).shape[-1]

    def logits(self, inputs: Any, *, batch_size: int | None = None) -> jax.Array:
        """Scores in inference mode, as `score` gives them.

        Args:
          inputs: [N, ...], any N; each N is compiled once.
          batch_size: as in `score`.

        Returns:
          [N, C].

        Raises:
          ValueError: inputs that are not numbers of the shape and dtype of `self.inputs`, or not finite.
        """
        converted = check_inputs("inputs", inputs)
        if converted.shape[1:] != self.inputs.shape[1:] or converted.dtype != self.inputs.dtype:
            hint = "; `preprocess` makes inputs of images" if self.preprocess is not None else ""
            raise ValueError(
                f"client {self.client_id} takes inputs {_describe(self.inputs)}, got {_describe(converted)}{hint}"
            )
        state = ClientState(self.state.params, self.state.model_state, (), ())
        return _score(self.architecture, state, converted, batch_size=batch_size)

    def probabilities(self, inputs: Any, *, batch_size: int | None = None) -> jax.Array:
        """The softmax of `logits`, [N, C]."""
        return jax.nn.softmax(self.logits(inputs, batch_size=batch_size))

    def predict(self, inputs: Any, *, batch_size: int | None = None) -> jax.Array:
        """The class with the highest score of each example, [N], int32; arguments as in `logits`."""
        return jnp.argmax(self.logits(inputs, batch_size=batch_size), axis=-1)


def trained_clients(
    groups: Groups,
    states: States,
    inputs: Any,
    *,
    preprocess: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[int, TrainedClient]:
    """The clients of a federation one by one, for predictions and for export.

    Args:
      groups: the architecture groups, such as `federation.groups`.
      states: per group, stacked clients [K, ...], also sharded ones. They are copied to the host.
      inputs: any inputs of the networks, [B, ...]; only shape and dtype are used.
      preprocess: from images, uint8, to inputs.

    Returns:
      Client id -> client, in order of the ids.

    Raises:
      ValueError: states of other groups or of other numbers of clients, or states that were donated to a call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedmd_jax as fmd
      >>> from fedmd_jax.models import MLP
      >>> network = fmd.architecture_from_linen(MLP((8,), num_classes=3))
      >>> federation = fmd.fedmd({"mlp": fmd.ArchitectureGroup(network, client_ids=(4, 1))})
      >>> inputs = jnp.ones((5, 4))
      >>> states = federation.new_states(jax.random.key(0), inputs)  # and training
      >>> clients = fmd.trained_clients(federation.groups, states, inputs)
      >>> list(clients)
      [1, 4]
      >>> fmd.Ensemble(clients.values()).predict(inputs).shape
      (5,)
    """
    sizes, wanted = group_sizes(states), {name: group.num_clients for name, group in groups.items()}
    if sizes != wanted:
        raise ValueError(f"states of the groups are needed, with {wanted} clients, got {sizes}")
    check_not_donated(states)
    of_groups = gather_clients(fetch_to_host(states))
    one = check_inputs("inputs", inputs[:1])
    clients = [
        TrainedClient(
            client_id=client_id,
            name=name,
            architecture=group.architecture,
            state=jax.tree.map(lambda leaf, k=k: leaf[k], of_groups[name]),
            inputs=jax.ShapeDtypeStruct(one.shape, one.dtype),
            preprocess=preprocess,
        )
        for name, group in groups.items()
        for k, client_id in enumerate(group.client_ids)
    ]
    return {client.client_id: client for client in sorted(clients, key=lambda client: client.client_id)}


Combine = Callable[[jax.Array], jax.Array]  # logits [K, N, C] -> scores [N, C]


def mean_logits(logits: chex.Array) -> jax.Array:
    """The mean of the clients' logits, [K, N, C] -> [N, C].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.simulation.mean_logits(jnp.array([[[0.0, 4.0]], [[2.0, 0.0]]])).tolist()
      [[1.0, 2.0]]
    """
    return jnp.mean(logits, axis=0)


def mean_probabilities(logits: chex.Array) -> jax.Array:
    """The mean of the clients' probabilities, [K, N, C] -> [N, C].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.simulation.mean_probabilities(jnp.array([[[0.0, 0.0]], [[99.0, -99.0]]])).tolist()
      [[0.75, 0.25]]
    """
    return jnp.mean(jax.nn.softmax(logits), axis=0)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several clients that predict together.

    Attributes:
      clients: at least one, all with the same classes.

    Raises:
      ValueError: no client.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedmd_jax as fmd
      >>> from fedmd_jax.models import MLP
      >>> network = fmd.architecture_from_linen(MLP((8,), num_classes=3))
      >>> federation = fmd.fedmd({"mlp": fmd.ArchitectureGroup(network, client_ids=(0, 1, 2))})
      >>> inputs = jnp.ones((5, 4))
      >>> states = federation.new_states(jax.random.key(0), inputs)  # and training
      >>> clients = fmd.trained_clients(federation.groups, states, inputs)
      >>> ensemble = fmd.Ensemble([clients[0], clients[2]])
      >>> ensemble.predict(inputs).shape
      (5,)
      >>> ensemble.predict(inputs, combine=fmd.simulation.mean_probabilities).shape
      (5,)
      >>> ensemble.predict(inputs, combine=lambda logits: jnp.median(logits, axis=0)).shape
      (5,)
    """

    clients: Iterable[TrainedClient]

    def __post_init__(self):
        object.__setattr__(self, "clients", tuple(self.clients))
        if not self.clients:
            raise ValueError("an ensemble needs at least one client, got none")

    def scores(self, inputs: Any, *, combine: Combine = mean_logits, batch_size: int | None = None) -> jax.Array:
        """The scores of all clients, combined.

        Args:
          inputs: [N, ...].
          combine: logits [K, N, C] -> scores [N, C], such as `mean_logits`, `mean_probabilities`, or your own.
          batch_size: as in `score`.

        Returns:
          [N, C].

        Raises:
          ValueError: as in `TrainedClient.logits`.
        """
        return combine(jnp.stack([client.logits(inputs, batch_size=batch_size) for client in self.clients]))

    def predict(self, inputs: Any, *, combine: Combine = mean_logits, batch_size: int | None = None) -> jax.Array:
        """The class with the highest score of each example, [N], int32; arguments as in `scores`."""
        return jnp.argmax(self.scores(inputs, combine=combine, batch_size=batch_size), axis=-1)


def _describe(inputs: Any) -> str:
    return f"{inputs.dtype}[{', '.join(['N', *map(str, inputs.shape[1:])])}]"
