import contextlib
import dataclasses
import shlex
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments import side_by_side
from fedmd_jax.experiments.prepared import choose_seeds_at_once
from fedmd_jax.experiments.progress import Progress, Several
from fedmd_jax.experiments.side_by_side import Meeting, pad_alike
from fedmd_jax.metrics import ClientMetrics, RoundMetrics
from fedmd_jax.types import PrivateDataset


class Programs:
    """`pretrain` and `round` of runs whose only state is a number, stacked; and what they were given."""

    def __init__(self, size):
        self.meeting, self.given = Meeting(size), []
        self.threads = set()
        self.fails = lambda given: None

    def pretrain(self, x):
        return self.meeting.call("pretrain", self._pretrain, x)

    def round(self, x, data=None):
        return self.meeting.call("round", self._round, x, {"data": data})

    def _pretrain(self, x):
        return self._note("pretrain", x, 10 * x)

    def _round(self, x, data):
        return self._note("round", x, x + 1)

    def _note(self, program, x, result):
        self.threads.add(threading.current_thread())
        self.given.append((program, x.tolist()))
        self.fails(x.tolist())
        return result


def hold(programs, *runs, **how):
    results = {}

    def of(number, run):
        results[number] = run()

    programs.meeting.hold([lambda number=number, run=run: of(number, run) for number, run in enumerate(runs)], **how)
    return [results[number].tolist() for number in range(len(runs))]


def test_calls_of_the_same_program_are_one_call_in_the_thread_that_holds():
    programs = Programs(3)
    runs = [lambda x=x: programs.round(programs.pretrain(jnp.float32(x))) for x in (1, 2, 3)]
    assert hold(programs, *runs) == [11, 21, 31]
    assert [(program, sorted(x)) for program, x in programs.given] == [("pretrain", [1, 2, 3]), ("round", [10, 20, 30])]
    assert programs.threads == {threading.current_thread()}


def test_who_is_behind_goes_first_and_the_size_stays():
    """One begins with its second round, another ends early: numbers do not depend on who else is there."""
    programs = Programs(2)

    def whole():
        return programs.round(programs.round(programs.pretrain(jnp.float32(1))))

    def second():
        return programs.round(jnp.float32(100))

    assert hold(programs, whole, second) == [12, 101]
    first, *others = programs.given
    assert first == ("pretrain", [1, 1])
    assert [(program, len(x)) for program, x in others] == [("round", 2), ("round", 2)]
    assert sorted(others[0][1]) == [10, 100]


def test_who_is_a_network_behind_goes_first():
    meeting, groups, given = Meeting(2), toys.groups(), []

    def pretrain(states):
        given.append({name: x.tolist() for name, x in states.items()})
        return states

    federation = meeting.attend(dataclasses.replace(toys.federation(groups), pretrain=pretrain))

    def run(number, names):
        for name in names:
            federation.pretrain({name: jnp.float32(number)})

    first, *others = groups
    meeting.hold([lambda: run(0, others), lambda: run(1, groups)])
    assert given == [{first: [1, 1]}, *({name: [0, 1]} for name in others)]


def test_other_shapes_are_another_call():
    programs = Programs(2)
    runs = [lambda x=x: programs.pretrain(jnp.asarray(x, jnp.float32)) for x in (1.0, [2.0, 3.0])]
    assert hold(programs, *runs) == [10, [20, 30]]
    assert len(programs.given) == 2


def test_data_that_stay_the_same_are_stacked_once(monkeypatch):
    stacked = []
    stack = side_by_side._stack
    monkeypatch.setattr(
        side_by_side, "_stack", lambda trees: stacked.append(len(jax.tree.leaves(trees))) or stack(trees)
    )
    programs = Programs(2)

    def run():
        x, data = jnp.float32(1), jnp.ones(3)
        for _ in range(3):
            x = programs.round(x, data)
        return programs.round(x, jnp.zeros(3))

    assert hold(programs, run, run) == [5, 5]
    assert stacked.count(2) == 4 + 2  # states in every call; data where they are others


@pytest.mark.parametrize("size", [2, 3])
def test_where_memory_does_not_hold_all_fewer_go_at_once(size, capsys):
    programs = Programs(3)

    def fail(given):
        if len(given) > size:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    programs.fails = fail
    runs = [lambda x=x: programs.round(programs.pretrain(jnp.float32(x))) for x in (1, 2, 3)]
    assert hold(programs, *runs) == [11, 21, 31]
    assert programs.meeting.size == size
    told = "not enough memory for all seeds at once: 2 at a time\n" if size == 2 else ""
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: even one is too many", "INTERNAL: a bug"])
def test_what_a_program_raises_is_raised(message):
    programs = Programs(2)

    def fail(given):
        raise jax.errors.JaxRuntimeError(message)

    programs.fails = fail
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        hold(programs, *[lambda: programs.round(jnp.float32(1))] * 2)
    assert len(programs.given) == (2 if "RESOURCE" in message else 1)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_ends_the_others_before_their_next_program(kind):
    programs = Programs(2)

    def failing():
        programs.pretrain(jnp.float32(1))
        raise kind("failed")

    def other():
        return programs.round(programs.pretrain(jnp.float32(2)))

    before = threading.active_count()
    with pytest.raises(kind, match="failed"):
        hold(programs, failing, other)
    assert [program for program, _ in programs.given] == ["pretrain"]
    assert threading.active_count() == before


def test_ctrl_c_ends_all():
    programs = Programs(2)
    checked = []

    def check():
        checked.append(True)
        if programs.given:
            raise KeyboardInterrupt

    def run():
        x = jnp.float32(0)
        while True:
            x = programs.round(x)

    with pytest.raises(KeyboardInterrupt):
        hold(programs, run, run, held=contextlib.nullcontext, check=check)
    assert len(programs.given) == 1


@pytest.mark.parametrize("place", range(3))
def test_ctrl_c_while_the_threads_are_started_leaves_none_behind(monkeypatch, place):
    programs, started = Programs(3), []
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == place + 1:
            raise KeyboardInterrupt

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hold(programs, *[lambda: programs.round(jnp.float32(1))] * 3)
    assert threading.active_count() == before


def dataset(num_rows, num_clients=None):
    shape = (num_rows,) if num_clients is None else (num_clients, num_rows)
    return PrivateDataset(jnp.ones((*shape, 2)), jnp.ones(shape, int), jnp.full(shape[:-1], num_rows))


def test_padding_makes_shapes_alike_and_leaves_the_real_rows():
    runs = [{"private": {"a": dataset(n, 2)}, "test": dataset(m), "pooling": None} for n, m in ((3, 7), (5, 4))]
    padded = pad_alike(runs)
    assert len({str(jax.tree.map(jnp.shape, each)) for each in padded}) == 1
    for run, each in zip(runs, padded, strict=True):
        for ours, theirs in ((run["private"]["a"], each["private"]["a"]), (run["test"], each["test"])):
            num_rows = ours.labels.shape[-1]
            np.testing.assert_array_equal(ours.num_examples, theirs.num_examples)
            np.testing.assert_array_equal(ours.labels, theirs.labels[..., :num_rows])
            np.testing.assert_array_equal(ours.inputs, theirs.inputs[..., :num_rows, :])


def test_progress_is_that_of_who_is_behind():
    told = []

    class Listener(Progress):
        def phase(self, title):
            told.append(title)

        def round(self, metrics):
            told.append((metrics.round, metrics.mean_accuracy, metrics.digested))

    def metrics(round_, accuracy, digested=True):
        return RoundMetrics(round_, (ClientMetrics(0, "mlp", accuracy, None, None),), digested)

    one, other = Several(Listener(), [0, 1]).observers()
    other.phase("rounds")  # goes on after round 0
    one.phase("transfer learning: public data, done in DIR")
    one.phase("rounds")
    one.round(metrics(0, 0.5))
    one.round(metrics(1, 0.25, digested=False))
    one.phase("local only")
    other.round(metrics(1, 0.75))
    other.phase("local only")
    other.phase("pooled upper bound")
    one.phase("pooled upper bound")
    public, rounds, *rest = told
    assert (public, rounds) == ("transfer learning: public data, done in DIR", "rounds")
    assert rest == [(0, 0.5, True), (1, 0.5, True), "local only", "pooled upper bound"]


def test_progress_within_the_public_half_is_that_of_who_is_behind():
    told, listener = [], Progress()
    listener.phase = told.append
    one, other = Several(listener, [0, 0]).observers()
    numbers = ((one, "networks 1 to 2"), (other, "network 1"), (other, "network 2"), (one, "network 10"))
    for seed, which in (*numbers, (other, "network 3")):
        seed.phase(f"transfer learning: public data, {which} of 10")
    assert [title.split(", ")[1] for title in told] == ["networks 1 to 2 of 10", "network 2 of 10", "network 3 of 10"]


def test_by_default_a_cpu_trains_one_seed_at_a_time(experiment, monkeypatch):
    assert choose_seeds_at_once(experiment, 5) == 1
    assert choose_seeds_at_once(dataclasses.replace(experiment, seeds_at_once=4), 3) == 3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one = dataclasses.replace(experiment, devices=1)
    with jax.default_prng_impl("rbg"):
        assert choose_seeds_at_once(one, 5) == 1
        with pytest.raises(ValueError, match="seeds run side by side with threefry2x32 keys only, got rbg"):
            choose_seeds_at_once(dataclasses.replace(one, seeds_at_once=2), 5)
    assert [choose_seeds_at_once(one, num_seeds) for num_seeds in (1, 5, 20)] == [1, 5, 8]
    assert choose_seeds_at_once(experiment, 5) == 1  # all four devices


@pytest.mark.parametrize(
    ("settings", "num_seeds", "message"),
    [
        ({}, 1, "seeds_at_once is of several seeds, got 2 for one seed"),
        ({"devices": 2}, 3, "seeds run side by side on one device only, got seeds_at_once 2 and 2 devices"),
    ],
)
def test_what_cannot_be_side_by_side_is_refused(experiment, settings, num_seeds, message):
    with pytest.raises(ValueError, match=message):
        choose_seeds_at_once(dataclasses.replace(experiment, seeds_at_once=2, **settings), num_seeds)


def test_real_training_side_by_side_differs_by_rounding_at_most(data_folder, tmp_path, capsys):
    """Early stopping, absent clients, and one seed more than run at once."""
    options = shlex.split(
        f"--data.data-dir {data_folder} --data.public dots --data.private marks --data.num-public 30 "
        "--data.private-classes 4 1 2 --data.num-test 20 --networks mlp:n1=3 mlp:n1=3 --subset-size 10 "
        "--public-training.num-epochs 3 --public-training.patience 1 --private-training.num-epochs 1 "
        "--no-pooled --revisit.num-epochs 1 --num-rounds 2 --availability 0.7 --seeds 3"
    )
    for name, more in (("one", []), ("two", ["--seeds-at-once", "2"])):
        assert main(["run", "--out", str(tmp_path / name), *options, *more]) == 0
        assert ("seeds 0, 1 side by side" in capsys.readouterr().out) == bool(more)
    for seed in range(3):
        (one, ones), (two, twos) = (files.read_run(tmp_path / name / f"seed{seed}") for name in ("one", "two"))
        assert one["mean"] == pytest.approx(two["mean"], abs=1e-6)
        for ours, theirs in zip(ones, twos, strict=True):
            for loss in ("digest_loss", "revisit_loss"):
                assert ours.pop(loss) == (None if theirs[loss] is None else pytest.approx(theirs[loss], rel=1e-5))
                del theirs[loss]
            assert ours == theirs
