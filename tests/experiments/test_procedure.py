import dataclasses
import gc
import weakref

import chex
import numpy as np
import pytest
from experiments.counting import UNIT, counting

from fedmd_jax.experiments.ahead import Ahead
from fedmd_jax.experiments.kept import ROUNDS, InMemory, OnDisk
from fedmd_jax.experiments.observer import Observer, Observers
from fedmd_jax.experiments.prepared import (
    choose_mesh,
    client_shapes,
    clients_at_once,
    communication,
    group_clients,
    prepare,
)
from fedmd_jax.experiments.procedure import _num_pretrained, compiled_once
from fedmd_jax.experiments.settings import Phase
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import fedmd


def test_clients_with_equal_networks_are_a_group_and_keep_their_weights(experiment):
    groups = group_clients(experiment, 7)
    assert {name: (group.client_ids, group.weights) for name, group in groups.items()} == {
        "mlp:n1=3": ((0, 2), (1.0, 3.0)),
        "mlp": ((1,), (2.0,)),
    }
    equal = group_clients(dataclasses.replace(experiment, weights=None), 7)
    assert [group.weights for group in equal.values()] == [(1.0, 1.0), (1.0,)]


def test_prepared(experiment):
    prepared = prepare(experiment)
    assert prepared.experiment is experiment
    assert prepared.datasets.num_classes == 7
    assert {name: private.inputs.shape for name, private in prepared.private.items()} == {
        "mlp:n1=3": (2, 9, 5, 5, 1),
        "mlp": (1, 9, 5, 5, 1),
    }
    for name, client_ids in (("mlp:n1=3", (0, 2)), ("mlp", (1,))):
        for position, client_id in enumerate(client_ids):
            inputs, labels = prepared.datasets.private[client_id]
            assert (prepared.private[name].inputs[position] == inputs).all()
            assert (prepared.private[name].labels[position] == labels).all()


def test_settings_reach_the_federation(experiment, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "fedmd_jax.experiments.prepared.fedmd",
        lambda groups, **settings: given.update(settings) or fedmd(groups, subset_size=10),
    )
    prepare(dataclasses.replace(experiment, clients_per_chunk=2, score_bound=3.0))
    assert (given["clients_per_chunk"], given["score_bound"]) == (2, 3.0)


def test_dropouts_stragglers_and_what_went_wrong_before_are_told(experiment):
    """The first step of the public half goes too far; nothing is left to digest but for whom there is certainty."""
    experiment = dataclasses.replace(
        experiment,
        public_training=Phase(num_epochs=2, batch_size=16, learning_rate=1e38),
        availability=(1.0, 0.0, 1.0),
        completion=(1.0, 1.0, 0.0),
        local=False,
        pooled=False,
    )
    told = []
    listener = Observer()
    listener.round = lambda metrics: told.append([client.status for client in metrics.clients])
    run(prepare(experiment), listener, Stopwatch())
    assert told == [["public training not finite"] * 3] + [["ok", "absent", "incomplete"]] * 2


def test_what_is_sent(experiment):
    sent = communication(prepare(experiment), num_rounds=2)
    assert sent.upload_bytes_per_client_round == sent.download_bytes_per_client_round == 10 * 7 * 4
    assert sent.total_bytes == 2 * (10 * 7 * 4) * 3 * 2
    sizes = {"mlp:n1=3": 25 * 3 + 3 + 3 * 7 + 7, "mlp": 25 * 7 + 7}
    assert sent.fedavg_bytes_per_client_round == 4 * sum(sizes[name] for name in experiment.networks) / 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": ("mlp", "mlp", "cnn")}, "network 'cnn': the kind must be one of .*"),
        ({"networks": ("mlp", "mlp", "3conv:n1=2,n2=2,n3=2")}, ".* wants images .* of at least 12x12, got .*"),
        ({"devices": 9}, "num_devices must be from 1 to 4, the devices that there are, got 9"),
        ({"networks": ("mlp",) * 5, "weights": None}, "5 clients with 3 examples per class need 15 of each, .*"),
    ],
)
def test_settings_that_do_not_fit_the_data(experiment, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare(dataclasses.replace(experiment, **settings))


def test_a_mesh_is_of_several_devices(monkeypatch):
    """Four cores of a CPU are one device unless all are asked for; four accelerators are four."""
    assert [choose_mesh(devices) and choose_mesh(devices).size for devices in (None, 1, 2, "all")] == [None, None, 2, 4]
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert choose_mesh(None).size == 4
    assert choose_mesh(1) is None


def test_on_many_devices_a_run_is_the_same_from_what_it_has_kept(experiment, tmp_path):
    """All phases: two clients in one group and one in another, on two devices; what is on disk knows of no device."""
    on_devices = dataclasses.replace(experiment, devices=2, pretrained_dir=str(tmp_path / "pretrained"))
    told = []
    for number in range(2):
        prepared, notes = prepare(on_devices), Notes()
        assert (prepared.federation.mesh.size, clients_at_once(prepared)) == (2, {"mlp:n1=3": 1, "mlp": 1})
        kept = OnDisk(tmp_path / str(number), {}, every=1, num_rounds=2, position=dict)
        with compiled_once(prepared, Stopwatch()) as run_one:
            run_one(prepared, notes, kept)
        told.append([part for part in notes.told if not isinstance(part, str)])
    assert told[0] == told[1]
    assert told[0][:-2] == [0, 1, 2]
    assert [sorted(accuracy) for accuracy in told[0][-2:]] == [[0, 1, 2], [0, 1, 2]]
    shapes = client_shapes(prepare(experiment))
    chex.assert_trees_all_equal_shapes_and_dtypes(kept.load("rounds", shapes), shapes)
    kept.close()


class Notes(Observer):
    """Everything in the order it was told."""

    def __init__(self):
        self.told = []

    def phase(self, title):
        self.told.append(title)

    def round(self, metrics):
        self.told.append(metrics.round)

    def local(self, accuracy, undone):
        self.told += [accuracy, undone] if undone else [accuracy]

    def pooled(self, accuracy):
        self.told.append(accuracy)


def run(prepared, observer, watch):
    with compiled_once(prepared, watch) as run_one:
        run_one(prepared, observer)


def test_what_is_kept_of_the_public_half(experiment):
    """On a mesh all networks train at once: what one device has kept of some of them is of no use there."""
    kept, found = InMemory(["pretrained"]), {}
    for devices in (1, 2):
        federation = prepare(dataclasses.replace(experiment, devices=devices)).federation
        for num_done in (0, 1, 2):  # 0 was written when they trained at once on one device, too
            kept.save("pretrained", num_done, {})
            found[devices, num_done] = _num_pretrained(federation, kept)
    assert found == {(1, 0): 2, (1, 1): 1, (1, 2): 2, (2, 0): 2, (2, 1): 0, (2, 2): 2}
    assert _num_pretrained(federation, InMemory([])) == 0


def test_a_run_tells_everybody_everything_in_order(experiment):
    notes, same, accuracies = Notes(), Notes(), []
    listener = Observer()
    listener.round = lambda metrics: accuracies.append([client.accuracy for client in metrics.clients])
    run(counting(prepare(experiment)), Observers(notes, listener, same), Stopwatch())
    assert notes.told == same.told
    assert notes.told == [
        "preparing the networks",
        "transfer learning: public data, network 1 of 2",
        "transfer learning: public data, network 2 of 2",
        "transfer learning: private data",
        ROUNDS,
        *(0, 1, 2),
        "local only",
        dict.fromkeys(range(3), 12366 * UNIT),  # as many rounds, from where the clients were before the first
        "pooled upper bound",
        dict.fromkeys(range(3), 125 * UNIT),  # from the pretrained clients, not from those that revisited private data
    ]
    assert accuracies == [[123 * UNIT] * 3, [1234 * UNIT] * 3, [12344 * UNIT] * 3]


def test_nothing_is_compared_where_nothing_is_asked_for(experiment):
    notes = Notes()
    experiment = dataclasses.replace(experiment, local=False, pooled=False, num_rounds=0)
    run(counting(prepare(experiment)), notes, Stopwatch())
    assert notes.told[-2:] == [ROUNDS, 0]


def test_without_rounds_the_control_is_transfer_learning(experiment):
    notes = Notes()
    run(counting(prepare(dataclasses.replace(experiment, pooled=False, num_rounds=0))), notes, Stopwatch())
    assert notes.told[-2:] == ["local only", dict.fromkeys(range(3), 123 * UNIT)]


def test_the_seconds_of_a_run(experiment):
    watch = Stopwatch()
    run(counting(prepare(experiment)), Observer(), watch)
    assert all(seconds > 0 for seconds in watch.seconds().values())


def test_other_seeds_are_run_with_the_same_programs(experiment, monkeypatch):
    num_compiled = []
    compile_one = Ahead._compile

    def counted(self, *arguments):
        before = len(self._compiled)
        compiled = compile_one(self, *arguments)
        num_compiled.append(len(self._compiled) - before)
        return compiled

    monkeypatch.setattr(Ahead, "_compile", counted)
    experiment = dataclasses.replace(experiment, networks=("mlp", "mlp:n1=3"), weights=None)
    first, second = (prepare(dataclasses.replace(experiment, seed=seed)) for seed in (3, 4))
    both, alone = [Notes(), Notes()], Notes()
    with compiled_once(first, Stopwatch()) as run_one:
        programs = sum(num_compiled)
        run_one(first, both[0])
        run_one(second, both[1])
        assert sum(num_compiled) == programs == 8  # one for each network of the public half
    run(second, alone, Stopwatch())
    assert both[1].told == alone.told
    assert (first.datasets.test.inputs != second.datasets.test.inputs).any()  # the split is another


def stopping(experiment, **monitors):
    """With early stopping in these phases."""
    phases = {name: dataclasses.replace(experiment.digest, patience=1, monitor=what) for name, what in monitors.items()}
    return dataclasses.replace(experiment, **phases)


def test_the_data_of_a_seed_do_not_stay_while_the_next_one_runs(experiment):
    prepared = prepare(dataclasses.replace(experiment, num_rounds=0, local=False, pooled=False))
    alive = weakref.ref(prepared.datasets.public.inputs)
    with compiled_once(prepared, Stopwatch()):
        prepared = None
        gc.collect()
        assert alive() is None


def test_validation_data_are_held_out_of_training_and_of_nothing_else(experiment):
    plain = prepare(experiment)
    prepared = prepare(stopping(experiment, public_training="validation", pooled_training="validation"))
    assert set(prepared.validation) == {"pretrain", "pool"}
    for name, train, whole, num_held in (
        ("pretrain", prepared.pretraining, plain.datasets.public, 3),
        ("pool", prepared.pooling, plain.pooling, 3),
    ):
        held = prepared.validation[name]
        assert len(held.labels) == held.num_examples == num_held
        found = np.concatenate([train.inputs, held.inputs]).reshape(len(whole.labels), -1)
        expected = np.asarray(whole.inputs).reshape(len(whole.labels), -1)
        order, same = np.lexsort(found.T), np.lexsort(expected.T)
        np.testing.assert_array_equal(found[order], expected[same])  # every row once
        np.testing.assert_array_equal(np.concatenate([train.labels, held.labels])[order], whole.labels[same])
    for name in ("public", "test"):  # the rounds and the clients' own data are as they were
        assert (getattr(prepared.datasets, name).inputs == getattr(plain.datasets, name).inputs).all()
    assert plain.validation == {}
    assert plain.pretraining is plain.datasets.public


def test_the_test_set_is_looked_at_only_where_it_is_asked_for(experiment, data_folder):
    prepared = prepare(stopping(experiment, private_training="test", pooled_training="test"))
    assert set(prepared.validation) == {"personalize", "pool"}
    assert all(data is prepared.datasets.test for data in prepared.validation.values())
    assert (prepared.pooling.inputs == prepare(experiment).pooling.inputs).all()
    assert prepared.datasets.public_test is None
    with pytest.raises(ValueError, match="no data set 'dots' with split 'test'"):
        prepare(stopping(experiment, public_training="test"))
    public_marks = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, public="marks"))
    monitored = prepare(stopping(public_marks, public_training="test")).validation["pretrain"]
    assert len(monitored.labels) == 40


def test_a_run_with_early_stopping(experiment):
    experiment = dataclasses.replace(experiment, networks=("mlp", "mlp"), weights=None, num_rounds=0)
    monitors = {"public_training": "validation", "private_training": "test", "pooled_training": "validation"}
    notes = Notes()
    run(prepare(stopping(experiment, **monitors)), notes, Stopwatch())
    assert set(notes.told[-1]) == {0, 1}


@pytest.mark.parametrize(
    ("monitors", "message"),
    [
        ({"revisit": "test"}, "revisit has no early stopping, but its patience is 1"),
        ({"digest": "validation"}, "digest has no early stopping, but its patience is 1"),
        ({"private_training": "validation"}, "private_training has too few examples .* can only monitor test, got val"),
    ],
)
def test_early_stopping_where_it_cannot_be(experiment, monitors, message):
    with pytest.raises(ValueError, match=message):
        stopping(experiment, **monitors)
