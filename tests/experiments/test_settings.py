import dataclasses

import jax.numpy as jnp
import pytest

from fedmd_jax.experiments import EXPERIMENTS, smoke
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.settings import Data, Experiment, Phase

NETWORKS = ("mlp:n1=8", "mlp:n1=6")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"num_epochs": 1.5}, "num_epochs must be an integer of at least 1, got 1.5"),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"patience": -1}, "patience must be an integer of at least 0, got -1"),
        ({"min_delta": -1.0}, "min_delta must be finite and not negative, got -1.0"),
        ({"monitor": "luck"}, "monitor must be one of validation, test, got 'luck'"),
        ({"learning_rate": "fast"}, "learning_rate must be positive and finite, got 'fast'"),
    ],
)
def test_a_phase_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Phase(**{"num_epochs": 1, "batch_size": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_public": 0}, "num_public must be an integer of at least 1, got 0"),
        ({"examples_per_class": 0}, "examples_per_class must be an integer of at least 1, got 0"),
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1, got 1.0"),
        ({"num_test": 0}, "num_test must be an integer of at least 1, got 0"),
        ({"private_classes": ()}, "private_classes must be at least one class and no class twice, got none"),
        ({"private_classes": (1, 1)}, "private_classes must be at least one class and no class twice, got 1, 1"),
        ({"private_classes": (-1,)}, "private_classes must be integers from 0, got -1"),
    ],
)
def test_data_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Data(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": ()}, "networks must be a list of names, one per client, got 'none'"),
        ({"networks": "mlp"}, "networks must be a list of names, one per client, got 'mlp'"),
        ({"num_rounds": -1}, "num_rounds must be an integer of at least 0, got -1"),
        ({"num_rounds": "x"}, "num_rounds must be an integer of at least 0, got 'x'"),
        ({"subset_size": 0}, "subset_size must be an integer of at least 1, got 0"),
        ({"subset_size": 5001}, "subset_size must be at most the public dataset, num_public = 5000 .*, got 5001"),
        ({"availability": (0.5, 1.5)}, "availability must be between 0 and 1, got 0.5, 1.5"),
        ({"completion": (float("nan"),)}, "completion must be between 0 and 1, got nan"),
        ({"availability": ()}, "availability must be one number, or one per client, 2, got 0"),
        ({"completion": (1.0,) * 3}, "completion must be one number, or one per client, 2, got 3"),
        ({"score_bound": 0.0}, "score_bound must be positive and finite, got 0.0"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
        ({"devices": "many"}, "devices must be an integer of at least 1, got 'many'"),
        ({"clients_per_chunk": 0}, "clients_per_chunk must be an integer of at least 1, got 0"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
        ({"weights": (1.0,)}, "weights must be one per client, 2, or None, got 1"),
        ({"weights": (1.0, -1.0)}, "weights must be finite and not negative, got 1.0, -1.0"),
        ({"weights": (1.0, float("nan"))}, "weights must be finite and not negative, got 1.0, nan"),
        ({"temperature": 0.0, "distance": "kl"}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": 2.0}, "temperature is of distance kl, but distance is mae, got 2.0"),
        ({"head_penalty": float("inf")}, "head_penalty must be finite and not negative, got inf"),
        ({"subset": "first"}, "subset must be one of random, stratified, got 'first'"),
        ({"distance": "l2"}, "distance must be one of mae, mse, kl, got 'l2'"),
    ],
)
def test_an_experiment_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Experiment(**{"networks": NETWORKS, **settings})


def test_the_distance_of_an_experiment():
    scores, targets = jnp.array([[1.0, 3.0]]), jnp.array([[2.0, 2.0]])
    assert Experiment(networks=NETWORKS).distance_function()(scores, targets) == 1.0
    assert Experiment(networks=NETWORKS, distance="mse").distance_function()(scores, targets - 1.0) == 2.0
    hot = Experiment(networks=NETWORKS, distance="kl", temperature=2.0).distance_function()(scores, targets)
    cold = Experiment(networks=NETWORKS, distance="kl").distance_function()(scores, targets)
    assert 0 < cold < hot  # times the square of the temperature


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("change", [lambda experiment: experiment, smoke], ids=["whole", "smoke"])
def test_presets_are_whole(name, change):
    experiment = change(EXPERIMENTS[name])
    assert dataclasses.replace(experiment) == experiment  # all checks again
    for network in set(experiment.networks):
        architecture_from_name(network, 16)


def test_what_is_tuned_sends_no_more_than_the_paper_does():
    paper, tuned = EXPERIMENTS["letters-iid"], EXPERIMENTS["letters-iid-tuned"]
    chosen = {name: getattr(tuned, name) for name in ("private_training", "digest", "revisit", "num_rounds")}
    assert dataclasses.replace(paper, **chosen) == tuned
    assert tuned.num_rounds < paper.num_rounds


def test_one_probability_for_all_or_one_each():
    assert Experiment(networks=NETWORKS).probabilities() is None
    assert Experiment(networks=NETWORKS, availability=(0.5,), completion=(1.0, 0.25)).probabilities() == {
        "availability": {0: 0.5, 1: 0.5},
        "completion": {0: 1.0, 1: 0.25},
    }
