"""A population of which each round sees a cohort: the work of a round is that of the cohort, whatever the population.

States and private data of those who sit out stay at home, on the host or on the device, and nothing touches them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.attendance import AttendancePolicy
from fedmd_jax.checks import check_count
from fedmd_jax.clients import Home, check_home
from fedmd_jax.cohorts import Cohort, CohortSize, cohort_of, cohort_sizes, draw_cohort, put_clients, take_clients
from fedmd_jax.datasets import Private
from fedmd_jax.evaluate import Evaluation
from fedmd_jax.federation import Federation, States, Validation, check_not_donated
from fedmd_jax.mapping import chunk_rows
from fedmd_jax.metrics import RoundMetrics, round_metrics
from fedmd_jax.spread import gather_clients
from fedmd_jax.types import Attendance, Participants, PrivateDataset, PublicDataset, TransferInfo


class Population(NamedTuple):
    """Everybody, per group [K, ...]: writable NumPy arrays where the home is the host, else JAX arrays.

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
    home: Home = "host",
) -> Population:
    """Fresh clients, the same as `federation.init` makes, a cohort at a time.

    Args:
      federation: of everybody.
      key: seeds the parameters.
      public: the public dataset.
      private: per group, [K, N, ...]; NumPy arrays (from `stack_private(..., home="host")`) if they do not fit on the
        device.
      cohort_size: how many clients the device sees at once.
      home: where states and private data stay between rounds: "host", or "device" where all of them fit, which saves
        the way of the cohort.

    Returns:
      The population.

    Raises:
      ValueError: data that does not fit the networks, an impossible cohort, an unknown home, or a population on the
        device where clients are spread over a mesh.
    """
    check_home(home)
    if home == "device" and federation.mesh is not None:
        raise ValueError("the home of a population must be the host where clients are spread over a mesh, got 'device'")
    sizes = _sizes(federation, cohort_size)
    federation.check(public, private)
    empty = np.empty if home == "host" else jnp.empty
    inputs = public.inputs[:1]
    shapes = gather_clients(jax.eval_shape(federation.new_states, key, inputs))
    states = jax.tree.map(lambda leaf: empty(leaf.shape, leaf.dtype), shapes)
    private = jax.device_get(private) if home == "host" else jax.device_put(private)
    population = Population(states, dict(private))
    for cohort, num_real in _everybody(federation, sizes):
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
      federation: of everybody.
      population: consumed.
      public: the public dataset, labelled.
      key: shuffling and dropout.
      public_validation: where the first half stops early, what it looks at: one unstacked dataset for everybody, or per
        group a stacked one, [K, ...].
      private_validation: the same for the second half.
      cohort_size: how many clients the device sees at once; changes nothing else.

    Returns:
      The population, and what `federation.transfer_learn` reports, NumPy arrays per group, [K, ...].

    Raises:
      ValueError: a half has early stopping without validation data or the reverse, or the population was consumed by an
        earlier call; nothing is consumed then.
    """
    _check_not_consumed(population)
    parts = []
    for cohort, num_real in _everybody(federation, _sizes(federation, cohort_size)):
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
    """`federation.evaluate` of everybody, a cohort at a time: the one thing here whose cost grows with the population.

    Args:
      federation: of everybody.
      population: is not consumed.
      test: one dataset for everybody, or per group a stacked one, [K, ...].
      cohort_size: how many clients the device sees at once; changes nothing else.

    Returns:
      Per group NumPy arrays, [K].
    """
    _check_not_consumed(population)
    parts = []
    for cohort, num_real in _everybody(federation, _sizes(federation, cohort_size)):
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
    attendance: AttendancePolicy | None = None,
    callback: Callable[[RoundMetrics, Population], Any] | None = None,
) -> tuple[Population, list[RoundMetrics]]:
    """Runs rounds, each with a cohort of its own that is evaluated after its round.

    With a cohort of everybody these are the rounds of `run_federation`.

    Args:
      federation: of everybody.
      population: after transfer learning, if there was any; consumed.
      public: the public dataset.
      key: of the rounds; round r uses `fold_in(key, r)`, and its cohort hangs on `key` and r alone.
      cohort_size: clients per round, of all groups together or of each.
      num_rounds: R.
      test: one dataset for everybody, or per group a stacked one, [K, ...].
      first_round: the number of the first of these rounds; 1 + r goes on where r rounds have been run.
      attendance: (round, client ids of the cohort per group) -> who of them takes part, such as `simulate_attendance`
        makes; by default all of them.
      callback: called with the metrics and the population after each round; the next one consumes it.

    Returns:
      The population and the history, [R]: a round's metrics are of its cohort. The first round has number
      `first_round`; there is no round 0, since nobody is evaluated who does not take part.

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
            federation, population, public, key, round_, cohort_size=cohort_size, test=test, attendance=attendance
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
    attendance: AttendancePolicy | None = None,
) -> tuple[Population, RoundMetrics]:
    """One round of `run_population`, with nothing checked: for loops of your own.

    Args:
      federation: of everybody.
      population: consumed.
      public: the public dataset.
      key: of all rounds.
      round_: the number of this one, at least 1.
      cohort_size: clients per round.
      test: as in `run_population`.
      attendance: as in `run_population`.

    Returns:
      The population, and the metrics of those who took part.
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
        participants=_participants(cohort, None if attendance is None else attendance(round_, cohort.client_ids)),
    )
    evaluations = federation.evaluate(states, _dataset_of(federation, test, cohort))
    metrics = round_metrics(federation.groups, round_, evaluations, info)
    return _put(population, cohort, states), metrics


def _sizes(federation: Federation, cohort_size: CohortSize) -> dict[str, int]:
    sizes = cohort_sizes(federation.groups, cohort_size)
    num_devices = 1 if federation.mesh is None else federation.mesh.size
    for name, size in sizes.items():
        for whose, number in (("a cohort", size), ("a population", federation.groups[name].num_clients)):
            if number % num_devices:
                raise ValueError(
                    f"group {name!r}: the clients of {whose} must be a multiple of the {num_devices} devices of the "
                    f"mesh, got {number}"
                )
    return sizes


def _everybody(federation: Federation, sizes: dict[str, int]) -> Iterator[tuple[Cohort, int]]:
    """Every client in one cohort, each cohort of one group, and how many of its clients come for the first time.

    All cohorts of a group have one size, so that each phase is one program: the last may repeat the last clients.
    """
    num_devices = 1 if federation.mesh is None else federation.mesh.size
    for name, group in federation.groups.items():
        chunks = chunk_rows(group.num_clients // num_devices, sizes[name] // num_devices)
        for rows, real in zip(*chunks, strict=True):  # as many clients for each device
            rows = (rows[:, None] * num_devices + np.arange(num_devices)).ravel()
            yield cohort_of(federation.groups, {name: rows}), int(real.sum()) * num_devices


def _participants(cohort: Cohort, attendance: Attendance | None = None) -> Participants:
    return Participants(dict(cohort.client_ids), dict(cohort.weights), *(attendance or ()))


def _take(federation: Federation, tree: Private | States, cohort: Cohort) -> Private | States:
    """What a cohort has of a tree of everybody, per group; spread over the mesh, if there is one."""
    return federation.spread({name: take_clients(tree[name], rows) for name, rows in cohort.rows.items()})


def _dataset_of(federation: Federation, data: Validation | None, cohort: Cohort) -> Validation | None:
    """What a cohort has of test or validation data, which may be everybody's."""
    return data if data is None or isinstance(data, PrivateDataset) else _take(federation, data, cohort)


def _put(population: Population, cohort: Cohort, new: States, num_real: int | None = None) -> Population:
    """The population with the first `num_real` clients of a cohort, all by default, and the old one consumed."""
    states, new = dict(population.states), gather_clients(new)
    for name, rows in cohort.rows.items():
        if num_real is not None and num_real < len(rows):
            rows, new = rows[:num_real], jax.tree.map(lambda leaf: leaf[:num_real], new)
        states[name] = jax.tree.map(_consume, put_clients(states[name], rows, new[name]))
    return population._replace(states=states)


def _consume(leaf: chex.Array) -> chex.Array:
    """A view that can be written to; the array itself cannot from now on, which marks it as consumed."""
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
