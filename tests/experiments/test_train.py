"""Set-up and train loop, through the command line or `prepare`."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest

from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.settings import StoppablePhase
from fedmd_jax.experiments.setup import choose_mesh, choose_seeds_at_once, group_clients, prepare, stack
from fedmd_jax.simulation.federation import fedmd


@pytest.fixture
def options(data_folder):
    return shlex.split(
        f"--data.data-dir {data_folder} --data.public dots --data.private marks --data.num-public 30 "
        "--data.private-classes 4 1 2 --data.num-test 20 --networks mlp:n1=3 mlp mlp:n1=3 --subset-size 10 "
        "--public-training.num-epochs 3 --private-training.num-epochs 1 --pooled-training.num-epochs 1 "
        "--revisit.num-epochs 1 --num-rounds 2"
    )


def run(path, options):
    """The records of a run, and its config."""
    assert main(["run", "--out", str(path), *options]) == 0
    lines = [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
    return lines, json.loads((path / files.CONFIG).read_text()), json.loads((path / files.SUMMARY).read_text())


def test_clients_with_equal_networks_are_a_group_and_keep_their_weights(experiment):
    groups = group_clients(experiment, 7)
    assert {name: (group.client_ids, group.weights) for name, group in groups.items()} == {
        "mlp:n1=3": ((0, 2), (1.0, 3.0)),
        "mlp": ((1,), (2.0,)),
    }
    equal = group_clients(dataclasses.replace(experiment, weights=None), 7)
    assert [group.weights for group in equal.values()] == [(1.0, 1.0), (1.0,)]


def test_settings_reach_the_federation(experiment, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "fedmd_jax.experiments.setup.make_federation",
        lambda groups, algorithm, **settings: given.update(settings) or fedmd(groups, subset_size=10),
    )
    prepare([dataclasses.replace(experiment, clients_per_chunk=2, score_clip=3.0)])
    assert (given["clients_per_chunk"], [each.keywords for each in given["transforms"]]) == (2, [{"bound": 3.0}])


def test_learning_rates_decay_over_all_rounds(experiment):
    setup = prepare([dataclasses.replace(experiment, learning_rate_decay="cosine", num_rounds=4)])
    for program in ("round", "revisit"):
        factors = [float(setup.arguments(program, round_)[1]["learning_rate_factor"]) for round_ in (1, 3)]
        assert factors == pytest.approx([1, 0.5])
    assert "learning_rate_factor" not in prepare([experiment]).arguments("round", 2)[1]


def test_augmentations_reach_the_public_subset(experiment):
    setup = prepare([dataclasses.replace(experiment, subset_augmentation=("warp", "cut"))])
    draw = setup.experiment.subset_function()
    assert [each.__name__ for each in draw.keywords["augmentations"]] == ["warp_images", "cut_images"]
    assert draw.keywords["draw_subset"].__name__ == "draw_public_subset"


def test_what_is_sent(experiment):
    sent = prepare([experiment]).communication(2)
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
        prepare([dataclasses.replace(experiment, **settings)])


def test_a_mesh_is_of_several_devices(monkeypatch):
    """Four cores of a CPU are one device unless all are asked for; four accelerators are four."""
    assert [choose_mesh(devices) and choose_mesh(devices).size for devices in (None, 1, 2, "all")] == [None, None, 2, 4]
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert choose_mesh(None).size == 4
    assert choose_mesh(1) is None


def test_seeds_at_once(experiment, monkeypatch):
    assert choose_seeds_at_once(experiment, 5) == 1
    assert choose_seeds_at_once(dataclasses.replace(experiment, vmap_seeds=4), 3) == 3
    many = dataclasses.replace(experiment, vmap_seeds=2, devices=2)
    assert choose_seeds_at_once(many, 1) == 1
    with pytest.raises(ValueError, match="vmap_seeds must be 1 on several devices, got 2 on 2 devices"):
        choose_seeds_at_once(many, 3)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    one = dataclasses.replace(experiment, devices=1)
    assert [choose_seeds_at_once(one, num_seeds) for num_seeds in (1, 5, 20)] == [1, 5, 8]


def test_stacking_pads_with_zeros():
    stacked = stack([{"a": np.ones((1, 2)), "n": np.int32(1)}, {"a": np.ones((3, 2)), "n": np.int32(3)}])
    assert stacked["a"].sum(axis=(1, 2)).tolist() == [2, 6]
    assert stacked["n"].tolist() == [1, 3]


def test_seeds_trained_at_once_differ_by_rounding_at_most(options, tmp_path):
    """Early stopping, absent clients, learning rates that decay, and one seed more than are trained at once."""
    options += shlex.split("--public-training.patience 1 --availability 0.7 --no-pooled --num-seeds 3 --num-rounds 2")
    options += ["--learning-rate-decay", "cosine"]
    options += ["--networks", "mlp:n1=3", "mlp:n1=3"]
    for name, more in (("one", []), ("two", ["--vmap-seeds", "2"])):
        assert main(["run", "--out", str(tmp_path / name), *options, *more]) == 0
    for seed in range(3):
        (one, ones), (two, twos) = (files.read_run(tmp_path / name / f"seed{seed}") for name in ("one", "two"))
        assert one["mean"] == pytest.approx(two["mean"], abs=1e-6)
        for ours, theirs in zip(ones, twos, strict=True):
            for loss in ("digest_loss", "revisit_loss"):
                assert ours.pop(loss) == (None if theirs[loss] is None else pytest.approx(theirs[loss], rel=1e-5))
                del theirs[loss]
            assert ours == theirs


def test_failures_dropouts_and_stragglers_are_in_the_metrics(options, tmp_path):
    """The first step of the public half goes too far; every availability and completion is certain."""
    options += shlex.split(
        "--public-training.learning-rate 1e38 --pooled-training.learning-rate 1e38 "
        "--availability 1 0 1 --completion 1 1 0"
    )
    lines, _, summary = run(tmp_path / "run", options)
    status = [[line["status"] for line in lines if line["round"] == round_] for round_ in range(3)]
    assert status == [["public training not finite"] * 3] + [["ok", "dropped", "straggler"]] * 2
    assert None in [client["pooled_accuracy"] for client in summary["clients"]]


def test_the_baseline_is_the_round_without_digest(options, tmp_path):
    """With one client the consensus is its own scores, so that a step towards it changes nothing: both are the same."""
    rate = "--private-training.learning-rate 0.03 --revisit.learning-rate 0.03 --revisit.num-epochs 5"
    options += shlex.split(f"--networks mlp --digest.learning-rate 1e-30 --head-penalty 0 --no-pooled {rate}")
    lines, _, _ = run(tmp_path / "run", options)
    assert [line["local_accuracy"] for line in lines] == [line["accuracy"] for line in lines]
    assert len({line["accuracy"] for line in lines}) > 1


def test_on_many_devices_a_run_is_the_same_with_clients_from_the_cache(options, tmp_path):
    options += ["--devices", "2", "--pretrained-dir", str(tmp_path / "pretrained")]
    first, config, _ = run(tmp_path / "first", options)
    second, again, _ = run(tmp_path / "second", options)
    assert first == second
    assert (config["pretrained_from"], len(again["pretrained_from"])) == ({}, 2)


def test_pretrained_clients_are_shared_group_by_group(options, tmp_path, capsys):
    without, _, bound = run(tmp_path / "without", options)
    options += ["--pretrained-dir", str(tmp_path / "kept")]
    run(tmp_path / "first", options)
    folders = sorted((tmp_path / "kept").iterdir())
    assert len(folders) == 2
    shutil.rmtree(folders[0])
    capsys.readouterr()
    lines, config, again = run(tmp_path / "second", options)
    assert capsys.readouterr().out.count("transfer learning: public data") == 1
    assert list(config["pretrained_from"].values()) == [str(folders[1])]
    assert (lines, again["clients"]) == (without, bound["clients"])
    assert not (tmp_path / "second" / files.CHECKPOINTS / "pretrained").exists()


OTHER = StoppablePhase(num_epochs=2, batch_size=16)
SAME = {"mlp", "mlp:n1=3"}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 1}, set()),
        ({"networks": ("mlp:n1=3", "mlp", "mlp:n1=4")}, {"mlp"}),  # a group is not changed by the others
        ({"width": 2.0}, set()),
        ({"dtype": "bfloat16"}, set()),
        ({"head_penalty": 0.0}, set()),
        ({"public_training": OTHER}, set()),
        ({"public_training": dataclasses.replace(OTHER, patience=1)}, set()),
        ({"clients_per_chunk": 1}, set()),
        ({"devices": 2}, set()),
        ({"distance": "kl", "num_rounds": 7, "private_training": OTHER}, SAME),
    ],
)
def test_what_decides_the_pretrained_clients_decides_their_place(experiment, change, same, tmp_path):
    before, after = (
        prepare([each]).pretrained_cache(tmp_path) for each in (experiment, dataclasses.replace(experiment, **change))
    )
    assert {name for name in SAME if before.path(name) == after.path(name)} == same
