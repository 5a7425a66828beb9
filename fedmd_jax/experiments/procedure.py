"""The whole procedure of the paper, from fresh clients to the last round."""

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax

from fedmd_jax.attendance import AttendancePolicy, all_clients, attendance_or_everybody, simulate_attendance
from fedmd_jax.clients import group_client_ids
from fedmd_jax.experiments import together
from fedmd_jax.experiments.ahead import compiling
from fedmd_jax.experiments.kept import LOCAL, PRETRAINED, ROUNDS, TRANSFERRED, InMemory, Kept
from fedmd_jax.experiments.observer import LOCAL_ONLY, PREPARING, PRIVATE_HALF, PUBLIC_HALF, UPPER_BOUND, Observer
from fedmd_jax.experiments.prepared import Prepared, client_shapes
from fedmd_jax.experiments.side_by_side import Meeting
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import Federation, States, run_federation, run_local
from fedmd_jax.metrics import PRIVATE_FAULT, PUBLIC_FAULT, RoundMetrics, round_metrics, undone_clients, with_faults
from fedmd_jax.types import PrivateDataset, PublicDataset


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
        everybody = attendance_or_everybody(None, group_client_ids(federation.groups))
        shapes["participants"] = all_clients(federation.groups, everybody)
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
_FAULTS = PUBLIC_FAULT, PRIVATE_FAULT


class _PublicCall(NamedTuple):
    """A call of `pretrain` that is to come."""

    names: list[str]  # of the groups that it trains
    found: bool  # whether there is no need to, since another run has kept them


def _public_half(prepared: Prepared, kept: Kept | None) -> list[_PublicCall]:
    """What is left of the public half of transfer learning.

    On one device group after group, so that each can be told of and kept; on a mesh all at once, side by side.
    """
    federation = prepared.federation
    names = list(federation.groups)[_num_pretrained(federation, kept) if kept else 0 :]
    found = {name for name, place in prepared.pretrained.items() if place.found}
    if federation.mesh is not None:
        return [_PublicCall(names, found.issuperset(names))] if names else []
    calls = []
    for is_found, some in itertools.groupby(names, found.__contains__):
        some = list(some)
        calls += [_PublicCall(some, True)] if is_found else [_PublicCall([name], False) for name in some]
    return calls


def _num_pretrained(federation: Federation, kept: Kept) -> int:
    """Of how many groups the clients are kept: the round of this phase."""
    num_done, num_groups = kept.last(PRETRAINED), len(federation.groups)
    if num_done == 0:  # as it was written when all were one program
        return num_groups
    return num_done if num_done and (federation.mesh is None or num_done == num_groups) else 0


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
    federation, prepared, num_groups = run.federation, run.prepared, len(run.federation.groups)
    num_done, calls = _num_pretrained(federation, run.kept), _public_half(prepared, run.kept)
    if num_done:
        run.faults.update(run.kept.note(PRETRAINED))
        states = federation.put(run.kept.load(PRETRAINED, run.shapes))
    else:
        run.observer.phase(PREPARING)
        states = federation.new_states(run.keys.init, prepared.datasets.public.inputs[:1])  # `prepare` has checked it
    for call in calls:
        everybody = len(call.names) == num_groups
        first, num_done = num_done + 1, num_done + len(call.names)
        numbers = f"network {num_done}" if first == num_done else f"networks {first} to {num_done}"
        which = "" if everybody else f", {numbers} of {num_groups}"
        where = f", done in {prepared.experiment.pretrained_dir}" if call.found else ""
        run.observer.phase(f"{PUBLIC_HALF}{which}{where}")
        some = states if everybody else {name: states[name] for name in call.names}
        some, undone = (_load_shared(run, call.names), set()) if call.found else _pretrain(run, some)
        states = some if everybody else {**states, **some}
        run.kept.save(PRETRAINED, num_done, states, note=run.faults)
        if prepared.pretrained and not call.found and not undone:  # last: where it fails the run has lost nothing
            for name in call.names:
                prepared.pretrained[name].save(states[name])
    return states


def _load_shared(run: _Run, names: Collection[str]) -> States:
    """Clients of these groups that another run has kept."""
    places, shapes = run.prepared.pretrained, {name: run.shapes[name] for name in names}
    return run.federation.put(
        together.tell_arrays(lambda: {name: places[name].load(shapes[name]) for name in names}, shapes)
    )


def _pretrain(run: _Run, states: States) -> tuple[States, set[int]]:
    """Clients of some groups, trained, and the ids of those among them whose training was undone."""
    validation = _named(run.prepared.validation, "pretrain")
    states, info = run.federation.pretrain(states, run.prepared.pretraining, run.keys.public, *validation)
    undone = undone_clients(group_client_ids(run.federation.groups), info)
    run.faults[PUBLIC_FAULT] = sorted({*run.faults.get(PUBLIC_FAULT, []), *undone})
    return states, undone


def _clients_transferred(run: _Run) -> States:
    """Clients after transfer learning, where the rounds begin and the control does."""
    if run.kept.last(TRANSFERRED) is not None:
        run.faults.update(run.kept.note(TRANSFERRED))
        return run.federation.put(run.kept.load(TRANSFERRED, run.shapes))
    states = _clients_pretrained(run)
    run.observer.phase(PRIVATE_HALF)
    validation = _named(run.prepared.validation, "personalize")
    states, info = run.federation.personalize(states, run.prepared.private, run.keys.private, *validation)
    run.faults[PRIVATE_FAULT] = undone_clients(group_client_ids(run.federation.groups), info)
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
    states, info = run.federation.pool(states, run.prepared.pooling, run.keys.pooled, *validation)
    accuracy = _accuracy(run.federation, states, run.prepared.datasets.test)
    # Who did not get through the training has no bound: it is where it was before.
    undone = undone_clients(group_client_ids(run.federation.groups), info)
    run.observer.pooled({client_id: None if client_id in undone else accuracy[client_id] for client_id in accuracy})


def _named(validation: dict[str, PrivateDataset], name: str) -> list[PrivateDataset]:
    """The last argument of a program that stops early."""
    return [validation[name]] if name in validation else []


def _accuracy(federation: Federation, states: States, test: PrivateDataset) -> dict[int, float]:
    metrics = round_metrics(federation.groups, 0, federation.evaluate(states, test), None)
    return {client.client_id: client.accuracy for client in metrics.clients}


def pretrained_from(prepared: Prepared) -> dict[str, str]:
    """Per group the folder that this run takes its pretrained clients from; without those that it trains itself."""
    found = {name for call in _public_half(prepared, None) if call.found for name in call.names}
    return {name: str(place.path) for name, place in prepared.pretrained.items() if name in found}
