"""A population of clients of which each round trains a cohort. The cost of a round is that of its cohort.

States and private data of the other clients stay in storage, on the host or on the device, and are not accessed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.algorithms.participation import ParticipationPolicy
from fedmd_jax.checks import check_count
from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.mapping.chunking import chunk_rows
from fedmd_jax.mapping.groups import Storage, check_storage
from fedmd_jax.mapping.sharding import gather_clients
from fedmd_jax.simulation.cohorts import Cohort, CohortSize, cohort_of, cohort_sizes, draw_cohort, get_rows, set_rows
from fedmd_jax.simulation.federation import Federation, States, Validation, check_not_donated
from fedmd_jax.simulation.federation_data import Private
from fedmd_jax.simulation.metrics import RoundMetrics, round_metrics
from fedmd_jax.types import Participants, Participation, PrivateDataset, PublicDataset, TransferInfo


class Population(NamedTuple):
    """All clients, per group [K, ...]: writable NumPy arrays if they are stored on the host, else JAX arrays.

    Functions that train a population consume its states: use the population that they return.
    """

    states: States
    private: Private


def init_population(
    federation: Federation,
    key: chex.PRNGKey,
    public: PublicDataset,
    private: Private,
    *,
    cohort_size: CohortSize,
    storage: Storage = "host",
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

    Returns:
      The population.

    Raises:
      ValueError: data that does not fit the networks, an impossible cohort size, an unknown storage, or storage on the
        device together with a mesh.
    """
    check_storage(storage)
    if storage == "device" and federation.mesh is not None:
        raise ValueError("the storage of a population must be the host if there is a mesh, got 'device'")
    sizes = _sizes(federation, cohort_size)
    federation.check(public, private)
    empty = np.empty if storage == "host" else jnp.empty
    inputs = public.inputs[:1]
    shapes = gather_clients(jax.eval_shape(federation.programs["new_states"], key, inputs))
    if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(shapes)):
        raise ValueError("random keys in the optimizer states of a population must be of JAX's default kind (threefry)")
    states = jax.tree.map(lambda leaf: empty(leaf.shape, leaf.dtype), shapes)
    private = jax.device_get(private) if storage == "host" else jax.device_put(private)
    population = Population(states, dict(private))
    for cohort, num_real in _all_cohorts(federation, sizes):
        new = federation.new_states(key, inputs, client_ids=cohort.client_ids)
        population = _put(population, cohort, new, num_real)
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
    """
    _check_not_consumed(population)
    parts = []
    for cohort, num_real in _all_cohorts(federation, _sizes(federation, cohort_size)):
        states, private = (_take(federation, tree, cohort) for tree in population)
        validation = (_dataset_of(federation, data, cohort) for data in (public_validation, private_validation))
        states, info = federation.transfer_learn(
            states, public, private, key, *validation, participants=_participants(cohort)
        )
        population = _put(population, cohort, states, num_real)
        parts.append(([gather_clients(half) for half in info], num_real))
    return population, TransferInfo(*(_join([(halves[half], n) for halves, n in parts]) for half in (0, 1)))


def evaluate_population(
    federation: Federation, population: Population, test: Validation, *, cohort_size: CohortSize
) -> dict[str, Evaluation]:
    """Evaluates all clients, a cohort at a time. Its cost grows with the population.

    Args:
      federation: the federation of all clients.
      population: the population; its states are not donated.
      test: one dataset for all clients, or a stacked one per group, [K, ...].
      cohort_size: number of clients on the device at once; it does not change the results.

    Returns:
      Per group NumPy arrays, [K].
    """
    _check_not_consumed(population)
    parts = []
    for cohort, num_real in _all_cohorts(federation, _sizes(federation, cohort_size)):
        states = _take(federation, population.states, cohort)
        parts.append((federation.evaluate(states, _dataset_of(federation, test, cohort)), num_real))
    return _join(parts)


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
    callback: Callable[[RoundMetrics, Population], Any] | None = None,
) -> tuple[Population, list[RoundMetrics]]:
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
      callback: called with the metrics and the population after each round, whose states the next round donates.

    Returns:
      The population and the history, [R], with the metrics of the cohort of each round. The first round has number
      `first_round`; there is no round 0, since only clients of a cohort are evaluated.

    Raises:
      ValueError: a negative number of rounds, a first round below 1, data that does not fit the networks, or an
        impossible cohort.
    """
    check_count("num_rounds", num_rounds, minimum=0)
    check_count("first_round", first_round)
    _sizes(federation, cohort_size)
    _check_not_consumed(population)
    federation.check(public, population.private, test)
    history = []
    for round_ in range(first_round, first_round + num_rounds):
        population, metrics = population_round(
            federation, population, public, key, round_, cohort_size=cohort_size, test=test, participation=participation
        )
        history.append(metrics)
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

    Returns:
      The population, and the metrics of the cohort.
    """
    _check_not_consumed(population)
    key_cohorts = jax.random.fold_in(key, 0)  # free, since rounds count from 1
    cohort = draw_cohort(jax.random.fold_in(key_cohorts, round_), federation.groups, cohort_size)
    states, private = (_take(federation, tree, cohort) for tree in population)
    states, info = federation.round(
        states,
        public,
        private,
        jax.random.fold_in(key, round_),
        participants=_participants(cohort, None if participation is None else participation(round_, cohort.client_ids)),
    )
    evaluations = federation.evaluate(states, _dataset_of(federation, test, cohort))
    metrics = round_metrics(federation.groups, round_, evaluations, info)
    return _put(population, cohort, states), metrics


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


def _all_cohorts(federation: Federation, sizes: dict[str, int]) -> Iterator[tuple[Cohort, int]]:
    """Yields cohorts of one group each that cover all clients, with the number of clients that are not repeated.

    All cohorts of a group have the same size, so that each phase is one program; the last one may repeat clients.
    """
    num_devices = 1 if federation.mesh is None else federation.mesh.size
    for name, group in federation.groups.items():
        chunks = chunk_rows(group.num_clients // num_devices, sizes[name] // num_devices)
        for rows, real in zip(*chunks, strict=True):  # the same number of clients for each device
            rows = (rows[:, None] * num_devices + np.arange(num_devices)).ravel()
            yield cohort_of(federation.groups, {name: rows}), int(real.sum()) * num_devices


def _participants(cohort: Cohort, participation: Participation | None = None) -> Participants:
    return Participants(dict(cohort.client_ids), dict(cohort.weights), *(participation or ()))


def _take(federation: Federation, tree: Private | States, cohort: Cohort) -> Private | States:
    """The rows of a cohort of a tree of all clients, per group; sharded if there is a mesh."""
    return federation.shard({name: get_rows(tree[name], rows) for name, rows in cohort.rows.items()})


def _dataset_of(federation: Federation, data: Validation | None, cohort: Cohort) -> Validation | None:
    """The rows of a cohort of test or validation data; unchanged if it is one dataset for all clients."""
    return data if data is None or isinstance(data, PrivateDataset) else _take(federation, data, cohort)


def _put(population: Population, cohort: Cohort, new: States, num_real: int | None = None) -> Population:
    """Writes the first `num_real` clients of a cohort (default: all) back, and marks the old population as donated."""
    states, new = dict(population.states), gather_clients(new)
    for name, rows in cohort.rows.items():
        if num_real is not None and num_real < len(rows):
            rows, new = rows[:num_real], jax.tree.map(lambda leaf: leaf[:num_real], new)
        states[name] = jax.tree.map(_consume, set_rows(states[name], rows, new[name]))
    return population._replace(states=states)


def _consume(leaf: chex.Array) -> chex.Array:
    """Returns a writable view and makes the array read-only, which marks it as donated."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    view = leaf.view()
    leaf.flags.writeable = False
    return view


def _check_not_consumed(population: Population) -> None:
    check_not_donated(population.states)
    if any(isinstance(leaf, np.ndarray) and not leaf.flags.writeable for leaf in jax.tree.leaves(population.states)):
        raise ValueError("this population was consumed by an earlier call: use what it returned")


def _join(parts: list[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """Per group [K, ...] on the host, from the results of cohorts of one group each, of which the first n count."""
    of_group: dict[str, list[Any]] = {}
    for results, num_real in parts:
        for name, result in jax.device_get(dict(results)).items():
            of_group.setdefault(name, []).append(jax.tree.map(lambda leaf, n=num_real: leaf[:n], result))
    return {name: jax.tree.map(lambda *leaves: np.concatenate(leaves), *those) for name, those in of_group.items()}
