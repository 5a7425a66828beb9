"""A population of clients of which each round trains a cohort. The cost of a round is that of its cohort.

States and private data of the other clients stay in storage, on the host or on the device, and are not accessed.
"""

import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.algorithms.base import join_states, split_states
from fedmd_jax.algorithms.participation import ParticipationPolicy
from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.mapping.chunking import chunk_rows
from fedmd_jax.mapping.groups import Storage, check_storage
from fedmd_jax.mapping.sharding import gather_clients
from fedmd_jax.simulation.cohorts import Cohort, CohortSize, cohort_of, cohort_sizes, draw_cohort, get_rows, set_rows
from fedmd_jax.simulation.federation import Federation, States, Validation, check_rounds, server_key
from fedmd_jax.simulation.federation_data import Private
from fedmd_jax.simulation.metrics import History, RoundMetrics, round_metrics, with_server
from fedmd_jax.simulation.progress import show_rounds
from fedmd_jax.types import Participants, Participation, PublicDataset, TransferInfo


class Population(NamedTuple):
    """All clients, per group [K, ...]: writable NumPy arrays if they are stored on the host, else JAX arrays.

    Functions that train a population consume its states: use the population that they return.

    Example:
      >>> import jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> private = {"a": fmd.PrivateDataset(np.zeros((2, 3, 4)), np.zeros((2, 3), int), np.array([3, 3]))}
      >>> states = {"a": fmd.ClientState(np.zeros((2, 4, 2)), {}, (), ())}
      >>> population = fmd.simulation.Population(states, private)
      >>> population.states["a"].params.shape, population.private["a"].inputs.shape
      ((2, 4, 2), (2, 3, 4))
    """

    states: States  #: per group, stacked clients [K, ...]
    private: Private  #: per group, stacked private datasets [K, N, ...]
    memory: chex.ArrayTree = ()  #: what the server remembers, as in `FederationState`
    model: Any = ()  #: the server's own network, as in `FederationState`


def init_population(
    federation: Federation,
    key: chex.PRNGKey,
    public: PublicDataset,
    private: Private,
    *,
    cohort_size: CohortSize,
    storage: Storage = "host",
    folder: str | pathlib.Path | None = None,
) -> Population:
    """Initializes all clients as `federation.init` does, a cohort at a time.

    Args:
      federation: the federation of all clients.
      key: key of the parameters.
      public: the public dataset.
      private: per group, [K, N, ...]; NumPy arrays (from `stack_private(..., storage="host")`) if they do not fit on
        the device.
      cohort_size: number of clients on the device at once.
      storage: where states and private data are between rounds: "host", or "device" if all of them fit there, which
        saves the transfer of the cohort.
      folder: an existing folder in which the states are kept in files, one per group, if they do not fit into memory.
        Files of an earlier population are replaced. A round reads and writes the rows of its cohort.

    Returns:
      The population.

    Raises:
      ValueError: data that does not fit the networks, an impossible cohort size, an unknown storage, storage on the
        device together with a mesh or a folder, or a folder without space.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> federation = fmd.fedmd(groups, subset_size=2)
      >>> population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=1)
      >>> type(population.states["linear"].params).__name__, population.states["linear"].params.shape
      ('ndarray', (2, 4, 2))
    """
    check_storage(storage)
    if storage == "device" and federation.mesh is not None:
        raise ValueError("the storage of a population must be the host if there is a mesh, got 'device'")
    if storage == "device" and folder is not None:
        raise ValueError("the storage of a population must be the host if there is a folder, got 'device'")
    sizes = _sizes(federation, cohort_size)
    federation.check(public, private)
    empty = np.empty if storage == "host" else jnp.empty
    inputs = public.inputs[:1]
    shapes = gather_clients(jax.eval_shape(federation.programs["new_states"], key, inputs))
    if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(shapes)):
        raise ValueError("random keys in the optimizer states of a population must be of JAX's default kind (threefry)")
    if folder is None:
        states = jax.tree.map(lambda leaf: empty(leaf.shape, leaf.dtype), shapes)
    else:
        states = _empty_files(pathlib.Path(folder), shapes)
    private = jax.device_get(private) if storage == "host" else jax.device_put(private)
    population = Population(states, dict(private))
    for cohort in _all_cohorts(federation, sizes):
        population = _put(population, cohort, federation.new_states(key, inputs, client_ids=cohort.client_ids))
    return population


def transfer_learn_population(
    federation: Federation,
    population: Population,
    public: PublicDataset,
    key: chex.PRNGKey,
    public_validation: Validation | None = None,
    private_validation: Validation | None = None,
    *,
    cohort_size: CohortSize,
) -> tuple[Population, TransferInfo]:
    """`federation.transfer_learn` of all clients, a cohort at a time.

    Args:
      federation: the federation of all clients.
      population: the population; its states are donated.
      public: the public dataset, labelled.
      key: shuffling and dropout.
      public_validation: validation data, if the first half has early stopping: one unstacked dataset for all clients,
        or a stacked one per group, [K, ...].
      private_validation: the same for the second half.
      cohort_size: number of clients on the device at once; it does not change the results.

    Returns:
      The population, and what `federation.transfer_learn` reports, NumPy arrays per group, [K, ...].

    Raises:
      ValueError: a half has early stopping without validation data or the reverse, or the population was donated to an
        earlier call. Nothing is donated in that case.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4), [0, 1, 1, 0])
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> training = fmd.TrainingConfig(shuffle=False)
      >>> federation = fmd.fedmd(groups, subset_size=2, public_training=training, private_training=training)
      >>> population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=1)
      >>> population, info = fmd.simulation.transfer_learn_population(
      ...     federation, population, public, jax.random.key(1), cohort_size=1)
      >>> info.public["linear"].loss.shape, info.private["linear"].loss.shape  # clients, epochs
      ((2, 1), (2, 1))
    """
    _check_not_consumed(population)
    infos = []
    for cohort in _all_cohorts(federation, _sizes(federation, cohort_size)):
        states, private = (_take(federation, tree, cohort) for tree in population[:2])
        validation = (_take(federation, data, cohort) for data in (public_validation, private_validation))
        states, info = federation.transfer_learn(
            states, public, private, key, *validation, participants=_participants(cohort)
        )
        population = _put(population, cohort, states)
        infos.append(info)
    return population, TransferInfo(*(_join(federation, halves) for halves in zip(*infos, strict=True)))


def evaluate_population(
    federation: Federation,
    population: Population,
    test: Validation,
    *,
    cohort_size: CohortSize,
    confusion: bool = False,
) -> dict[str, Evaluation]:
    """Evaluates all clients, a cohort at a time. Its cost grows with the population.

    Args:
      federation: the federation of all clients.
      population: the population; its states are not donated.
      test: one dataset for all clients, or a stacked one per group, [K, ...].
      cohort_size: number of clients on the device at once; it does not change the results.
      confusion: as in `Federation.evaluate`.

    Returns:
      Per group NumPy arrays, [K].

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> test = fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> federation = fmd.fedmd(groups, subset_size=2)
      >>> population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=1)
      >>> found = fmd.simulation.evaluate_population(federation, population, test, cohort_size=1)
      >>> found["linear"].accuracy.tolist()  # without training all examples get class 0
      [0.5, 0.5]
    """
    _check_not_consumed(population)
    evaluations = []
    for cohort in _all_cohorts(federation, _sizes(federation, cohort_size)):
        states = _take(federation, population.states, cohort)
        test_data = _take(federation, test, cohort)
        evaluations.append(federation.evaluate(states, test_data, confusion=confusion))
    return _join(federation, evaluations)


def run_population(
    federation: Federation,
    population: Population,
    public: PublicDataset,
    key: chex.PRNGKey,
    *,
    cohort_size: CohortSize,
    num_rounds: int,
    test: Validation,
    first_round: int = 1,
    participation: ParticipationPolicy | None = None,
    learning_rate_schedule: Callable[[int], chex.Numeric] | None = None,
    callback: Callable[[RoundMetrics, Population], Any] | None = None,
    progress: bool = False,
) -> tuple[Population, History]:
    """Runs rounds. Each round samples a cohort, which is evaluated after the round.

    With a cohort of all clients these are the rounds of `run_federation`.

    Args:
      federation: the federation of all clients.
      population: the population, usually after transfer learning; its states are donated.
      public: the public dataset.
      key: key of the rounds. Round r uses `fold_in(key, r)`; its cohort depends on `key` and r only.
      cohort_size: number of clients per round, of all groups together or per group.
      num_rounds: number of rounds.
      test: one dataset for all clients, or a stacked one per group, [K, ...].
      first_round: number of the first of these rounds; 1 + r continues after r rounds.
      participation: (round, client ids of the cohort per group) -> participation record, such as
        `simulate_participation` makes; by default all of them take part.
      learning_rate_schedule: as in `run_federation`.
      callback: called with the metrics and the population after each round, whose states the next round donates.
      progress: as in `run_federation`.

    Returns:
      The population and the history, [R], with the metrics of the cohort of each round. The first round has number
      `first_round`; there is no round 0, since only clients of a cohort are evaluated.

    Raises:
      ValueError: a negative number of rounds, a first round below 1, data that does not fit the networks, or an
        impossible cohort.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> test = fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> training = fmd.TrainingConfig(batch_size=4, shuffle=False)
      >>> federation = fmd.fedmd(groups, subset_size=2, digest_training=training, revisit_training=training)
      >>> population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=1)
      >>> population, history = fmd.simulation.run_population(
      ...     federation, population, public, jax.random.key(1), cohort_size=1, num_rounds=2, test=test)
      >>> [(metrics.round, len(metrics.clients)) for metrics in history]
      [(1, 1), (2, 1)]
    """
    check_rounds(num_rounds, first_round)
    _sizes(federation, cohort_size)
    federation.check(public, population.private, test)
    of_rounds: dict[str, Any] = {"cohort_size": cohort_size, "test": test, "participation": participation}
    of_rounds |= {"learning_rate_schedule": learning_rate_schedule}
    history = History()
    if first_round == 1 and federation.has_server_state:
        _, *server = federation.start(population.states, public, server_key(key))
        population = Population(population.states, population.private, *server)
    with show_rounds(progress, first_round, num_rounds) as shown:
        shown.phase("compiling ...")
        for round_ in range(first_round, first_round + num_rounds):
            population, metrics = population_round(federation, population, public, key, round_, **of_rounds)
            history.append(metrics)
            shown.phase("rounds")
            shown.round(metrics)
            if callback is not None:
                callback(metrics, population)
    return population, history


def population_round(
    federation: Federation,
    population: Population,
    public: PublicDataset,
    key: chex.PRNGKey,
    round_: int,
    *,
    cohort_size: CohortSize,
    test: Validation,
    participation: ParticipationPolicy | None = None,
    learning_rate_schedule: Callable[[int], chex.Numeric] | None = None,
) -> tuple[Population, RoundMetrics]:
    """One round of `run_population` without checks of the data, for custom loops.

    Args:
      federation: the federation of all clients.
      population: the population; its states are donated.
      public: the public dataset.
      key: key of all rounds.
      round_: number of this round, at least 1.
      cohort_size: number of clients per round.
      test: as in `run_population`.
      participation: as in `run_population`.
      learning_rate_schedule: as in `run_population`.

    Returns:
      The population, and the metrics of the cohort.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> test = fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> training = fmd.TrainingConfig(batch_size=4, shuffle=False)
      >>> federation = fmd.fedmd(groups, subset_size=2, digest_training=training, revisit_training=training)
      >>> population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=1)
      >>> population, metrics = fmd.simulation.population_round(
      ...     federation, population, public, jax.random.key(1), 1, cohort_size=1, test=test)
      >>> metrics.round, len(metrics.clients)
      (1, 1)
    """
    _check_not_consumed(population)
    key_cohorts = jax.random.fold_in(key, 0)  # free, since rounds count from 1
    cohort = draw_cohort(jax.random.fold_in(key_cohorts, round_), federation.groups, cohort_size)
    states, private = (_take(federation, tree, cohort) for tree in population[:2])
    states, info = federation.round(
        join_states(states, population.memory, population.model),
        public,
        private,
        jax.random.fold_in(key, round_),
        participants=_participants(cohort, None if participation is None else participation(round_, cohort.client_ids)),
        learning_rate_factor=None if learning_rate_schedule is None else learning_rate_schedule(round_),
    )
    evaluations = federation.evaluate(states, _take(federation, test, cohort))
    server = federation.evaluate_server(states, test)
    metrics = with_server(round_metrics(federation.groups, round_, evaluations, info), server)
    clients, memory, model = split_states(states)
    return _put(population, cohort, clients)._replace(memory=memory, model=model), metrics


def _sizes(federation: Federation, cohort_size: CohortSize) -> dict[str, int]:
    sizes = cohort_sizes(federation.groups, cohort_size)
    num_devices = 1 if federation.mesh is None else federation.mesh.size
    for name, size in sizes.items():
        for what, number in (("a cohort", size), ("a population", federation.groups[name].num_clients)):
            if number % num_devices:
                raise ValueError(
                    f"group {name!r}: the clients of {what} must be a multiple of the {num_devices} devices of the "
                    f"mesh, got {number}"
                )
    return sizes


def _all_cohorts(federation: Federation, sizes: dict[str, int]) -> Iterator[Cohort]:
    """Yields cohorts of one group each that cover all clients in order.

    All cohorts of a group have the same size, so that each phase is one program; the last one may end with clients that
    it has already.
    """
    num_devices = 1 if federation.mesh is None else federation.mesh.size
    for name, group in federation.groups.items():
        chunks, _ = chunk_rows(group.num_clients // num_devices, sizes[name] // num_devices)
        for rows in chunks:  # the same number of clients for each device
            rows = (rows[:, None] * num_devices + np.arange(num_devices)).ravel()
            yield cohort_of(federation.groups, {name: rows})


def _participants(cohort: Cohort, participation: Participation | None = None) -> Participants:
    return Participants(dict(cohort.client_ids), dict(cohort.weights), *(participation or ()))


def _take(federation: Federation, data: Any, cohort: Cohort) -> Any:
    """The rows of a cohort of stacked clients or data, sharded if there is a mesh; returns unstacked data unchanged."""
    if not isinstance(data, Mapping):  # no data, or one dataset for all clients
        return data
    return federation.shard({name: get_rows(data[name], rows) for name, rows in cohort.rows.items()})


def _put(population: Population, cohort: Cohort, new: States) -> Population:
    """Writes the clients of a cohort back, each once, and marks the old population as consumed."""
    states, new = dict(population.states), gather_clients(new)
    for name, rows in cohort.rows.items():
        once, clients = np.unique(rows), new[name]
        if once.size < rows.size:
            clients = jax.tree.map(lambda leaf, n=once.size: leaf[:n], clients)
        states[name] = jax.tree.map(_consume, set_rows(states[name], once, clients))
    return population._replace(states=states)


def _consume(leaf: chex.Array) -> chex.Array:
    """Returns a writable view and makes the array read-only, which marks it as donated."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    view = leaf.view()
    leaf.flags.writeable = False
    return view


def _empty_files(folder, shapes):
    """Arrays of these shapes, [K, ...], in a file per group, in which the rows of one client are next to each other."""
    files = [folder / f"group{number}.bin" for number in range(len(shapes))]
    kinds = [_client_dtype(tree) for tree in shapes.values()]
    numbers = [jax.tree.leaves(tree)[0].shape[0] for tree in shapes.values()]
    wanted = sum(number * kind.itemsize for number, kind in zip(numbers, kinds, strict=True))
    replaced = sum(file.stat().st_blocks * 512 for file in files if file.exists())
    free = shutil.disk_usage(folder).free + replaced
    if wanted > free:
        raise ValueError(f"folder must have space for {wanted / 1e9:.1f} GB of states, got {free / 1e9:.1f} GB")
    states = {}
    for file, kind, number, (name, tree) in zip(files, kinds, numbers, shapes.items(), strict=True):
        file.unlink(missing_ok=True)  # another population may still use it
        clients = np.memmap(file, kind, "w+", shape=number)
        states[name] = jax.tree.structure(tree).unflatten([clients[field] for field in kind.names])
    return states


def _client_dtype(shapes):
    """The record of one client, with a field for each of its arrays."""
    leaves = enumerate(jax.tree.leaves(shapes))
    return np.dtype([(f"{number}", leaf.dtype, leaf.shape[1:]) for number, leaf in leaves], align=True)


def _check_not_consumed(population: Population) -> None:
    leaves = jax.tree.leaves(population.states)
    if any(not leaf.flags.writeable if isinstance(leaf, np.ndarray) else leaf.is_deleted() for leaf in leaves):
        raise ValueError("this population was consumed by an earlier call: use what it returned")


def _join(federation: Federation, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per group [K, ...] on the host, from the results of the cohorts of `_all_cohorts`."""

    def join(name, group):
        of_group = jax.device_get([part[name] for part in parts if name in part])
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: group.num_clients], *of_group)

    return {name: join(name, group) for name, group in federation.groups.items()}
