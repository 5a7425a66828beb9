import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.experiments import procedure
from fedmd_jax.experiments.kept import PRETRAINED, InMemory
from fedmd_jax.experiments.observer import Observer
from fedmd_jax.experiments.prepared import prepare
from fedmd_jax.experiments.pretrained import Pretrained, fingerprint
from fedmd_jax.experiments.procedure import compiled_once, pretrained_from
from fedmd_jax.experiments.run_directory import WriteError
from fedmd_jax.experiments.settings import Phase
from fedmd_jax.experiments.stopwatch import Stopwatch


class Notes(Observer):
    """What is told, as text: metrics are compared to the last digit."""

    def __init__(self):
        self.phases, self.results = [], []

    def phase(self, title):
        self.phases.append(title)

    def round(self, metrics):
        self.results.append(metrics)

    def pooled(self, accuracy):
        self.results.append(accuracy)


def run(experiment):
    notes = Notes()
    prepared = prepare(experiment)
    with compiled_once(prepared, Stopwatch()) as run_it:
        run_it(prepared, notes)
    return notes


def test_a_second_run_takes_the_clients_of_the_first_and_ends_the_same(experiment, tmp_path):
    experiment = dataclasses.replace(experiment, num_rounds=0, local=False)  # the bound begins with these clients, too
    without = run(experiment)
    kept = dataclasses.replace(experiment, pretrained_dir=str(tmp_path / "kept"))
    assert pretrained_from(prepare(kept)) == {}
    first = run(kept)
    assert list(pretrained_from(prepare(kept))) == ["mlp:n1=3", "mlp"]
    second = run(kept)
    assert first.results == second.results == without.results
    assert first.phases == without.phases
    assert [title for title in second.phases if str(tmp_path) in title] == [
        f"transfer learning: public data, done in {tmp_path / 'kept'}"
    ]
    other_rounds = dataclasses.replace(kept, distance="kl", private_training=Phase(num_epochs=2, batch_size=4))
    assert len(pretrained_from(prepare(other_rounds))) == 2


def test_a_run_takes_those_that_are_there_and_trains_the_others(experiment, tmp_path):
    experiment = dataclasses.replace(experiment, num_rounds=0, local=False)
    without = run(experiment)
    kept = dataclasses.replace(experiment, pretrained_dir=str(tmp_path))
    for name in ("mlp", "mlp:n1=3"):  # the second of the groups is trained alone, then the first
        run(kept)
        shutil.rmtree(prepare(kept).pretrained[name].path)
        assert name not in pretrained_from(prepare(kept))
        again = run(kept)
        assert sum("done in" in title for title in again.phases) == 1
        assert again.results == without.results
        assert len(pretrained_from(prepare(kept))) == 2


def test_groups_that_two_experiments_share_are_trained_once(experiment, tmp_path):
    one = dataclasses.replace(experiment, pretrained_dir=str(tmp_path), num_rounds=0, local=False, pooled=False)
    run(one)
    other = dataclasses.replace(one, networks=("mlp:n1=3", "mlp", "mlp:n1=5"))
    assert list(pretrained_from(prepare(other))) == ["mlp"]
    moved = dataclasses.replace(one, networks=("mlp", "mlp:n1=3", "mlp:n1=3"))
    assert pretrained_from(prepare(moved)) == {}  # a client's place decides its keys


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"networks": ("mlp:n1=3", "mlp", "mlp:n1=4")},
        {"width": 2.0},
        {"head_penalty": 0.0},
        {"public_training": Phase(num_epochs=2, batch_size=16)},
        {"public_training": Phase(num_epochs=1, batch_size=16, patience=1)},
        {"clients_per_chunk": 1},
        {"devices": 2},
        {"seeds_at_once": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_clients_decides_their_place(experiment, change, tmp_path):
    kept = dataclasses.replace(experiment, pretrained_dir=str(tmp_path))
    before, after = prepare(kept).pretrained, prepare(dataclasses.replace(kept, **change)).pretrained
    same = {name for name in before if name in after and before[name].path == after[name].path}
    assert same == ({"mlp"} if "networks" in change else set())  # a group is not changed by who else is there


@pytest.mark.parametrize("change", [{"devices": 3}, {"networks": ("mlp:n1=3", "mlp", "mlp:n1=4")}])
def test_on_a_mesh_everything_decides_the_place_of_all(experiment, change, tmp_path):
    kept = dataclasses.replace(experiment, pretrained_dir=str(tmp_path), devices=2)
    before, after = prepare(kept).pretrained, prepare(dataclasses.replace(kept, **change)).pretrained
    assert not {place.path for place in before.values()} & {place.path for place in after.values()}


def test_the_fingerprint_sees_every_number_shape_and_kind():
    data = [np.arange(4.0), np.arange(3)]
    prints = [
        fingerprint({"a": 1}, data),
        fingerprint({"a": 2}, data),
        fingerprint({"a": 1}, [data[0] + 1e-6, data[1]]),
        fingerprint({"a": 1}, [data[0].reshape(2, 2), data[1]]),
        fingerprint({"a": 1}, [data[0], data[1].astype(np.int32)]),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": 1}, data) == prints[0]


def test_states_come_back_to_the_bit(tmp_path):
    states = {"mlp:n1=3": {"w": jnp.array([[0.1, -0.0], [jnp.nan, 1e-40]]), "count": jnp.array([3], jnp.int32)}}
    kept = Pretrained(tmp_path / "deep" / "place", False)
    kept.save(states)
    found = kept.load(states)
    assert found["mlp:n1=3"]["w"].tobytes() == states["mlp:n1=3"]["w"].tobytes()
    assert found["mlp:n1=3"]["count"].tolist() == [3]


def test_clients_that_failed_are_not_kept(experiment, tmp_path):
    wild = dataclasses.replace(experiment.public_training, learning_rate=1e38)
    kept = dataclasses.replace(
        experiment, public_training=wild, num_rounds=0, local=False, pooled=False, pretrained_dir=str(tmp_path)
    )
    (metrics,) = run(kept).results
    assert "public training not finite" in {client.status for client in metrics.clients}
    assert pretrained_from(prepare(kept)) == {}


def test_of_two_groups_that_without_a_failure_is_kept(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(procedure, "undone_clients", lambda groups, losses: {1} if "mlp" in losses else set())
    kept = dataclasses.replace(experiment, num_rounds=0, local=False, pooled=False, pretrained_dir=str(tmp_path))
    (metrics,) = run(kept).results
    assert [client.status for client in metrics.clients if client.client_id == 1] == [
        "public training not finite, private training not finite"
    ]
    assert list(pretrained_from(prepare(kept))) == ["mlp:n1=3"]


def test_what_cannot_be_shared_is_kept_by_the_run(experiment, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    prepared = prepare(dataclasses.replace(experiment, pretrained_dir=str(tmp_path / "file" / "folder")))
    own = InMemory([PRETRAINED])
    with compiled_once(prepared, Stopwatch()) as run_it, pytest.raises(WriteError, match="cannot keep pretrained"):
        run_it(prepared, Notes(), own)
    assert own.last(PRETRAINED) == 1


def test_a_place_that_cannot_be_written_is_told_and_another_run_may_be_faster(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="cannot keep pretrained clients"):
        Pretrained(tmp_path / "file" / "place", False).save({"w": jnp.zeros(1)})


def test_who_does_not_get_through_the_bound_has_none(experiment):
    wild = dataclasses.replace(experiment.pooled_training, learning_rate=1e38)
    notes = run(dataclasses.replace(experiment, pooled_training=wild, num_rounds=0, local=False))
    assert None in notes.results[-1].values()
