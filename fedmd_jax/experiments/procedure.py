"""The whole procedure of the paper, from images to the last round."""

import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.attendance import AttendancePolicy, attendance_or_everybody, simulate_attendance
from fedmd_jax.clients import ArchitectureGroup, Groups, group_client_ids, stack_private
from fedmd_jax.communication import Communication, communication_bytes
from fedmd_jax.devices import client_costs
from fedmd_jax.experiments import together
from fedmd_jax.experiments.ahead import compiling
from fedmd_jax.experiments.datasets import Datasets, hold_out, load, pool
from fedmd_jax.experiments.kept import LOCAL, PRETRAINED, ROUNDS, TRANSFERRED, InMemory, Kept
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.own_data import of_everybody, take_own
from fedmd_jax.experiments.pretrained import Pretrained, fingerprint, places
from fedmd_jax.experiments.settings import Devices, Experiment
from fedmd_jax.experiments.side_by_side import Meeting
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import (
    Federation,
    States,
    fedmd,
    run_federation,
    run_local,
)
from fedmd_jax.mapping import chunk_of, client_mesh
from fedmd_jax.metrics import RoundMetrics, round_metrics, undone_clients, with_faults
from fedmd_jax.spread import gather_clients, is_spread_over_processes
from fedmd_jax.types import PrivateDataset, PublicDataset

# What an observer hears of, in this order; the public half may have an addition.
PREPARING = "preparing the networks"
PUBLIC_HALF, PRIVATE_HALF = "transfer learning: public data", "transfer learning: private data"
LOCAL_ONLY, UPPER_BOUND = "local only", "pooled upper bound"
TITLES = (PREPARING, PUBLIC_HALF, PRIVATE_HALF, ROUNDS, LOCAL_ONLY, UPPER_BOUND)


class Observer:
    """What a run tells while it goes on; listens to nothing where a method is not overridden."""

    def phase(self, title: str) -> None:
        """Something begins that may take a while."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is over; round 0 is the end of transfer learning."""

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """The control without digests is known, per client id, and rounds whose training was undone, where any was."""

    def pooled(self, accuracy: dict[int, float]) -> None:
        """The upper bound is known, per client id."""


class Observers(Observer):
    """Several observers as one; they hear in the order given."""

    def __init__(self, *observers: Observer):
        self._observers = observers

    def phase(self, title: str) -> None:
        """To all."""
        for observer in self._observers:
            observer.phase(title)

    def round(self, metrics: RoundMetrics) -> None:
        """To all."""
        for observer in self._observers:
            observer.round(metrics)

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """To all."""
        for observer in self._observers:
            observer.local(accuracy, undone)

    def pooled(self, accuracy: dict[int, float]) -> None:
        """To all."""
        for observer in self._observers:
            observer.pooled(accuracy)


class Prepared(NamedTuple):
    """Everything a run needs, checked, and nothing computed."""

    experiment: Experiment
    federation: Federation
    datasets: Datasets
    private: dict[str, PrivateDataset]  # per group, stacked
    pretraining: PublicDataset  # the public examples of transfer learning
    pooling: PrivateDataset | None  # the private examples of the upper bound, if it is wanted
    validation: dict[str, PrivateDataset]  # per program of the federation that stops early
    pretrained: dict[str, Pretrained]  # per group, where clients are kept after the public half, if they are to be


def prepare(experiment: Experiment) -> Prepared:
    """Loads the data and builds the federation.

    In many processes each loads the private examples of the clients on its own devices. The upper bound trains on
    everybody's: if it is wanted, they are sent from device to device.

    Args:
      experiment: all settings.

    Raises:
      ValueError: data that is missing or damaged, or settings that do not fit it.
    """
    public_test = experiment.public_training.monitored == "test"
    datasets = load(
        experiment.data, num_clients=len(experiment.networks), seed=experiment.seed, public_test=public_test
    )
    groups = group_clients(experiment, datasets.num_classes)
    mesh = choose_mesh(experiment.devices)
    costs = None if mesh is None else client_costs(groups, datasets.public.inputs[:1])
    federation = fedmd(
        groups,
        subset_size=experiment.subset_size,
        public_training=experiment.public_training.training(),
        private_training=experiment.private_training.training(),
        pooled_training=experiment.pooled_training.training(),
        digest_training=experiment.digest.training(),
        revisit_training=experiment.revisit.training(),
        distance=experiment.distance_function(),
        draw_subset=experiment.subset_function(),
        score_bound=experiment.score_bound,
        clients_per_chunk=experiment.clients_per_chunk or "auto",
        mesh=mesh,
        costs=costs,
    )
    datasets, private, pooled = _take_private(experiment, datasets, federation, costs)
    pretraining, pooling, validation = split_validation(experiment, datasets, pooled)
    federation.check(datasets.public, private, datasets.test, *validation.values())
    seen = (pretraining, validation.get("pretrain"))
    pretrained = _pretrained(experiment, groups, mesh, num_classes=datasets.num_classes, data=seen)
    datasets = datasets._replace(public=federation.put(datasets.public), test=federation.put(datasets.test))
    private, pretraining, pooling = map(federation.put, (private, pretraining, pooling))
    validation = {name: federation.put(examples) for name, examples in validation.items()}
    return Prepared(experiment, federation, datasets, private, pretraining, pooling, validation, pretrained)


def _take_private(
    experiment: Experiment, datasets: Datasets, federation: Federation, costs: Mapping[str, float] | None
) -> tuple[Datasets, Mapping[str, PrivateDataset], PrivateDataset | None]:
    """The datasets with the examples of this process's clients, those of each group, and those of all if wanted."""
    groups, mesh = federation.groups, federation.mesh
    if is_spread_over_processes(mesh):
        together.check_same("public and test data", fingerprint(None, (datasets.public, datasets.test)))
        datasets, private = take_own(groups, datasets, mesh, costs=costs)
        return datasets, private, pool(of_everybody(groups, private)) if experiment.pooled else None
    datasets = datasets._replace(private=dict(datasets.private))
    private = stack_private(groups, datasets.private)
    return datasets, private, pool(datasets.private) if experiment.pooled else None


def choose_mesh(devices: Devices) -> Mesh | None:
    """The devices of a run; None where it is one, which needs no mesh.

    Args:
      devices: how many, "all", or None for all accelerators. The cores of a CPU are one device, unless told otherwise.

    Raises:
      ValueError: more devices than there are.
    """
    if devices is None and jax.default_backend() == "cpu":
        return None
    mesh = client_mesh(None if devices == "all" else devices)
    return mesh if mesh.size > 1 else None


_KEYS_OF_THEIR_OWN = "threefry2x32"  # what others give hangs on all keys of a batch
_MOST_SEEDS_AT_ONCE = 8  # each has its own copy of all data on the device


def choose_seeds_at_once(experiment: Experiment, num_seeds: int) -> int:
    """How many of so many seeds run side by side: what is set, or what is thought to be fastest.

    Args:
      experiment: its devices, and what is set.
      num_seeds: how many there are to be.

    Raises:
      ValueError: more than one at once, of one seed, on many devices, or with keys that batches change.
    """
    wanted, mesh = experiment.seeds_at_once, choose_mesh(experiment.devices)
    keys = jax.config.jax_default_prng_impl
    alone = mesh is not None or jax.default_backend() == "cpu" or keys != _KEYS_OF_THEIR_OWN
    if wanted is None:
        wanted = 1 if alone else _MOST_SEEDS_AT_ONCE
    elif wanted > 1 and keys != _KEYS_OF_THEIR_OWN:
        raise ValueError(f"seeds run side by side with {_KEYS_OF_THEIR_OWN} keys only, got {keys}")
    elif wanted > 1 and num_seeds == 1:
        raise ValueError(f"seeds_at_once is of several seeds, got {wanted} for one seed")
    elif wanted > 1 and mesh is not None:
        raise ValueError(
            f"seeds run side by side on one device only, got seeds_at_once {wanted} and {mesh.size} devices"
        )
    return min(wanted, num_seeds)


def _pretrained(
    experiment: Experiment, groups: Groups, mesh: Mesh | None, *, num_classes: int, data: tuple
) -> dict[str, Pretrained]:
    if experiment.pretrained_dir is None:
        return {}
    names = ("width", "head_penalty", "clients_per_chunk", "public_training", "seed")
    settings = {name: getattr(experiment, name) for name in names} | {"num_classes": num_classes}
    # Rounding: on a mesh all groups are one program, and seeds side by side are, too.
    if mesh is not None:
        settings |= {"devices": mesh.size, "networks": experiment.networks}
    if (experiment.seeds_at_once or 1) > 1:
        settings["seeds_at_once"] = experiment.seeds_at_once
    of_groups = {name: settings | {"network": name, "client_ids": group.client_ids} for name, group in groups.items()}
    return places(pathlib.Path(experiment.pretrained_dir).expanduser(), of_groups, data)


def split_validation(
    experiment: Experiment, datasets: Datasets, pooled: PrivateDataset | None
) -> tuple[PublicDataset, PrivateDataset | None, dict[str, PrivateDataset]]:
    """What transfer learning and the upper bound train on, and what their early stopping looks at.

    Only where a phase monitors validation data is anything held out of its training.

    Args:
      experiment: its phases.
      datasets: of the experiment.
      pooled: private examples of all clients together; None where nobody trains on them.

    Returns:
      Public examples, pooled private examples, and by the name of the federation's function one validation set for
      everybody.
    """
    rng = np.random.default_rng([experiment.seed, 1])  # the data are drawn with another, and stay as they are
    phases = {
        "pretrain": (experiment.public_training.monitored, datasets.public, datasets.public_test),
        "personalize": (experiment.private_training.monitored, None, datasets.test),
        "pool": (experiment.pooled_training.monitored if pooled else None, pooled, datasets.test),
    }
    train, validation = {}, {}
    for name, (monitored, examples, test) in phases.items():
        train[name] = examples
        if monitored == "validation":
            train[name], validation[name] = hold_out(examples, experiment.data.validation_share, rng)
        elif monitored == "test":
            validation[name] = test
    return train["pretrain"], train["pool"], validation


def group_clients(experiment: Experiment, num_classes: int) -> dict[str, ArchitectureGroup]:
    """Clients with equal networks share a group, named by the network; a client's id is its place in the settings.

    Args:
      experiment: whose networks, weights and head penalty are used.
      num_classes: C.

    Raises:
      ValueError: a name is not that of a network.
    """
    members: dict[str, list[int]] = {}
    for client_id, name in enumerate(experiment.networks):
        members.setdefault(name, []).append(client_id)
    return {
        name: ArchitectureGroup(
            architecture_from_name(name, num_classes, head_penalty=experiment.head_penalty, width=experiment.width),
            client_ids,
            None if experiment.weights is None else [experiment.weights[i] for i in client_ids],
        )
        for name, client_ids in members.items()
    }


@contextmanager
def compiled_once(
    prepared: Prepared, watch: Stopwatch, kept: Kept | None = None, meeting: Meeting | None = None
) -> Iterator[Callable[[Prepared, Observer, Kept | None], None]]:
    """A function that runs this experiment, and others that differ from it in their seeds only, with the same programs.

    It goes through transfer learning, the rounds, and what they are compared with; its observer hears of phases, rounds
    and results as they come. The comparisons are last, so that the first accuracies are seen soon. It begins where the
    clients that are kept say, and keeps them as it goes on.

    Args:
      prepared: from `prepare`.
      watch: measures the phases.
      kept: of the first run.
      meeting: where several runs meet that are computed side by side; then the function is to be called in its threads.
    """
    experiment, federation, shapes = prepared.experiment, prepared.federation, _data_shapes(prepared)
    later = _done_before(prepared, kept) if kept else set()
    calls = [call.names for call in _public_half(prepared, kept) if not call.found]
    if not calls:
        later.add("pretrain")
    shapes["pretrain_calls"] = calls if federation.mesh is None else None
    del prepared  # the first seed's data must not stay in memory while the others run
    needed = {"new_states", "pretrain", "personalize", "evaluate"}
    wanted = {"round": True, "revisit": experiment.local, "pool": experiment.pooled}
    idle = {"round", "revisit"} if experiment.num_rounds == 0 else set()
    needed |= {name for name, is_wanted in wanted.items() if is_wanted} - idle
    if experiment.probabilities() is not None:
        shapes["attendance"] = attendance_or_everybody(None, group_client_ids(federation.groups))
    at_once = 1 if meeting is None else meeting.size
    with compiling(federation, watch, needed=needed, later=later, seeds_at_once=at_once, **shapes) as federation:
        yield partial(_run_phases, federation if meeting is None else meeting.attend(federation))


def _data_shapes(prepared: Prepared) -> dict[str, PublicDataset | PrivateDataset | dict[str, PrivateDataset]]:
    """Of everything that the programs are given, as `compiling` names it."""
    data = {"public": prepared.datasets.public, "private": prepared.private, "pooled": prepared.pooling}
    data |= {"test": prepared.datasets.test, "pretraining": prepared.pretraining, "validation": prepared.validation}
    return jax.eval_shape(lambda data: data, data)


def _done_before(prepared: Prepared, kept: Kept) -> set[str]:
    """Names of the programs that a run does not need which goes on; another seed may."""
    done, num_rounds = set(), prepared.experiment.num_rounds
    if _num_pretrained(prepared.federation, kept):
        done |= {"new_states"}
    if kept.last(TRANSFERRED) is not None:
        done |= {"personalize"}
    if kept.last(ROUNDS) == num_rounds:
        done |= {"round"}
    if kept.last(LOCAL) == num_rounds:
        done |= {"revisit"}
    return done


# What can go wrong in transfer learning, in this order.
_FAULTS = _PUBLIC_FAULT, _PRIVATE_FAULT = ("public training not finite", "private training not finite")


class _PublicCall(NamedTuple):
    """A call of `pretrain` that is to come."""

    names: list[str]  # of the groups that it trains
    found: bool  # whether they need not be, since they were kept by another run


def _public_half(prepared: Prepared, kept: Kept | None) -> list[_PublicCall]:
    """What is left of the public half of transfer learning.

    On one device group after group, so that each can be told of and kept; on a mesh all at once, side by side.
    """
    federation = prepared.federation
    names = list(federation.groups)[_num_pretrained(federation, kept) if kept else 0 :]
    calls = [[name] for name in names] if federation.mesh is None else [names] if names else []
    found = {name for name, place in prepared.pretrained.items() if place.found}
    return [_PublicCall(call, found.issuperset(call)) for call in calls]


def _num_pretrained(federation: Federation, kept: Kept) -> int:
    """Of how many groups the clients are kept; the round of this phase."""
    num_done = kept.last(PRETRAINED) or 0
    return num_done if federation.mesh is None or num_done == len(federation.groups) else 0


class Keys(NamedTuple):
    """Those of the phases of a run."""

    init: jax.Array
    public: jax.Array
    private: jax.Array
    rounds: jax.Array
    pooled: jax.Array
    attendance: jax.Array


def keys_of(seed: int) -> Keys:
    """All follow from the seed, so that none need be kept."""
    key = jax.random.key(seed)
    return Keys(*jax.random.split(key, 5), jax.random.fold_in(key, 5))  # `split` takes the first five of `fold_in`


class _Run(NamedTuple):
    """What every phase has at hand."""

    federation: Federation
    prepared: Prepared
    observer: Observer
    kept: Kept
    keys: Keys
    shapes: States
    faults: dict[str, list[int]]  # of transfer learning, found as it goes on


def _run_phases(federation: Federation, prepared: Prepared, observer: Observer, kept: Kept | None = None) -> None:
    """Every phase asks what is kept for where it begins: what was done before is not done again."""
    experiment = prepared.experiment
    if kept is None:
        wanted = {PRETRAINED: experiment.pooled, TRANSFERRED: experiment.local}
        kept = InMemory([phase for phase, is_wanted in wanted.items() if is_wanted])
    run = _Run(federation, prepared, observer, kept, keys_of(experiment.seed), client_shapes(prepared), {})
    _rounds(run)
    if experiment.local:
        _local(run)
    if experiment.pooled:
        _pool(run)


def _clients_pretrained(run: _Run) -> States:
    """Clients after the public half of transfer learning, where the upper bound begins."""
    federation, prepared, (names, shapes) = run.federation, run.prepared, (list(run.shapes), run.shapes)
    num_done, calls = _num_pretrained(federation, run.kept), _public_half(prepared, run.kept)
    if num_done:
        run.faults.update(run.kept.note(PRETRAINED))
        states = federation.put(run.kept.load(PRETRAINED, shapes))
    else:
        run.observer.phase(PREPARING)
        states = federation.new_states(run.keys.init, prepared.datasets.public.inputs[:1])  # `prepare` has checked it
    for call in calls:
        everybody = len(call.names) == len(names)
        which = "" if everybody else f", network {num_done + 1} of {len(names)}"
        where = f", done in {prepared.experiment.pretrained_dir}" if call.found else ""
        run.observer.phase(f"{PUBLIC_HALF}{which}{where}")
        some = states if everybody else {name: states[name] for name in call.names}
        some = _load_shared(run, call.names) if call.found else _pretrain(run, some)
        states = some if everybody else {**states, **some}
        num_done += len(call.names)
        run.kept.save(PRETRAINED, num_done, states, note=run.faults)
    return states


def _load_shared(run: _Run, names: Collection[str]) -> States:
    """Clients of these groups that another run has kept."""
    places, shapes = run.prepared.pretrained, {name: run.shapes[name] for name in names}
    return run.federation.put(
        together.tell_arrays(lambda: {name: places[name].load(shapes[name]) for name in names}, shapes)
    )


def _pretrain(run: _Run, states: States) -> States:
    """Clients of some groups, trained, and kept for other runs where all went well and that is wanted."""
    _, _, _, _, pretraining, _, validation, places = run.prepared
    names = list(states)
    states, losses = run.federation.pretrain(states, pretraining, run.keys.public, *_named(validation, "pretrain"))
    undone = undone_clients(run.federation.groups, losses)
    run.faults[_PUBLIC_FAULT] = sorted({*run.faults.get(_PUBLIC_FAULT, []), *undone})
    if not undone:
        for name in names if places else []:
            places[name].save(states[name])
    return states


def _clients_transferred(run: _Run) -> States:
    """Clients after transfer learning, where the rounds begin and the control does."""
    if run.kept.last(TRANSFERRED) is not None:
        run.faults.update(run.kept.note(TRANSFERRED))
        return run.federation.put(run.kept.load(TRANSFERRED, run.shapes))
    states = _clients_pretrained(run)
    run.observer.phase(PRIVATE_HALF)
    validation = _named(run.prepared.validation, "personalize")
    states, losses = run.federation.personalize(states, run.prepared.private, run.keys.private, *validation)
    run.faults[_PRIVATE_FAULT] = sorted(undone_clients(run.federation.groups, losses))
    run.kept.save(TRANSFERRED, 0, states, note=run.faults)
    return states


def _rounds(run: _Run) -> None:
    num_done, num_rounds = run.kept.last(ROUNDS) or 0, run.prepared.experiment.num_rounds
    if 0 < num_done == num_rounds:
        return
    states = run.federation.put(run.kept.load(ROUNDS, run.shapes)) if num_done else _clients_transferred(run)

    def tell(metrics: RoundMetrics, states: States) -> None:
        if metrics.round == 0:
            faults = {what: run.faults[what] for what in _FAULTS if what in run.faults}
            run.observer.round(with_faults(metrics, faults))
        else:
            run.observer.round(metrics)
            run.kept.save(ROUNDS, metrics.round, states, score=metrics.mean_accuracy)

    run.observer.phase(ROUNDS)
    run_federation(
        run.federation,
        states,
        run.prepared.datasets.public,
        run.prepared.private,
        run.keys.rounds,
        num_rounds=num_rounds - num_done,
        first_round=num_done + 1,
        test=run.prepared.datasets.test,
        attendance=_attendance(run),
        callback=tell,
    )


def _attendance(run: _Run) -> AttendancePolicy | None:
    probabilities = run.prepared.experiment.probabilities()
    return None if probabilities is None else simulate_attendance(run.keys.attendance, **probabilities)


def _local(run: _Run) -> None:
    num_done = run.kept.last(LOCAL) or 0
    states = run.federation.put(run.kept.load(LOCAL, run.shapes)) if num_done else _clients_transferred(run)
    # Pairs of a round and a client id, since JSON knows no keys but strings.
    undone = run.kept.note(LOCAL).get("undone", []) if num_done else []

    def keep(round_: int, states: States) -> None:
        run.kept.save(LOCAL, round_, states, note={"undone": list(undone)})

    run.observer.phase(LOCAL_ONLY)
    states = run_local(
        run.federation,
        states,
        run.prepared.private,
        run.keys.rounds,
        num_rounds=run.prepared.experiment.num_rounds - num_done,
        first_round=num_done + 1,
        attendance=_attendance(run),
        on_undone=lambda round_, client_ids: undone.extend([round_, i] for i in sorted(client_ids)),
        callback=keep,
    )
    rounds: dict[int, list[int]] = {}
    for round_, client_id in undone:
        rounds.setdefault(client_id, []).append(round_)
    run.observer.local(_accuracy(run.federation, states, run.prepared.datasets.test), rounds)


def _pool(run: _Run) -> None:
    states = _clients_pretrained(run)
    run.observer.phase(UPPER_BOUND)
    validation = _named(run.prepared.validation, "pool")
    states, losses = run.federation.pool(states, run.prepared.pooling, run.keys.pooled, *validation)
    accuracy = _accuracy(run.federation, states, run.prepared.datasets.test)
    # Who did not get through the training has no bound: it is where it was before.
    undone = undone_clients(run.federation.groups, losses)
    run.observer.pooled({client_id: None if client_id in undone else accuracy[client_id] for client_id in accuracy})


def _named(validation: dict[str, PrivateDataset], name: str) -> list[PrivateDataset]:
    """The last argument of a program that stops early."""
    return [validation[name]] if name in validation else []


def _accuracy(federation: Federation, states: States, test: PrivateDataset) -> dict[int, float]:
    metrics = round_metrics(federation.groups, 0, federation.evaluate(states, test), None)
    return {client.client_id: client.accuracy for client in metrics.clients}


def clients_at_once(prepared: Prepared) -> dict[str, int]:
    """How many clients of each group run at once on a device: what was set, or what was chosen."""
    setting, groups = prepared.experiment.clients_per_chunk or "auto", prepared.federation.groups
    states = client_shapes(prepared)
    mesh = prepared.federation.mesh
    chunks = {name: chunk_of(setting, name, states[name].params, mesh) for name in groups}
    of_device = {name: -(-group.num_clients // (mesh.size if mesh else 1)) for name, group in groups.items()}
    return {name: min(chunks[name] or of_device[name], of_device[name]) for name in groups}


def pretrained_from(prepared: Prepared) -> dict[str, str]:
    """Per group the folder that this run takes its pretrained clients from; without those that it trains itself."""
    found = {name for call in _public_half(prepared, None) if call.found for name in call.names}
    return {name: str(place.path) for name, place in prepared.pretrained.items() if name in found}


def communication(prepared: Prepared, *, num_rounds: int) -> Communication:
    """What so many rounds send, from the shapes of the networks; nothing is computed."""
    return communication_bytes(
        client_shapes(prepared),
        subset_size=prepared.experiment.subset_size,
        num_classes=prepared.datasets.num_classes,
        num_rounds=num_rounds,
    )


def client_shapes(prepared: Prepared) -> States:
    """The clients without their numbers, and on no devices; nothing is computed."""
    inputs = prepared.datasets.public.inputs[:1]
    return gather_clients(jax.eval_shape(prepared.federation.new_states, jax.random.key(0), inputs))
