import contextlib
import dataclasses
import json

import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings, strategies as st

from fedmd_jax.experiments import EXPERIMENTS, smoke
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.settings import Data, Experiment, StoppablePhase, settings_from

NETWORKS = ("mlp:n1=8", "mlp:n1=6")


PHASE = {"num_epochs": 1, "batch_size": 1}
OUT_OF_RANGE = [
    (StoppablePhase, {**PHASE, "num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
    (StoppablePhase, {**PHASE, "num_epochs": 1.5}, "num_epochs must be an integer of at least 1, got 1.5"),
    (StoppablePhase, {**PHASE, "learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
    (StoppablePhase, {**PHASE, "learning_rate": "fast"}, "learning_rate must be positive and finite, got 'fast'"),
    (StoppablePhase, {**PHASE, "patience": -1}, "patience must be an integer of at least 0, got -1"),
    (StoppablePhase, {**PHASE, "min_delta": -1.0}, "min_delta must be finite and not negative, got -1.0"),
    (Data, {"num_public": 0}, "num_public must be an integer of at least 1, got 0"),
    (Data, {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
    (Data, {"validation_share": 1.0}, "validation_share must be between 0 and 1, got 1.0"),
    (Data, {"private_classes": ()}, r"private_classes must be at least one class and no class twice, got \(\)"),
    (Data, {"private_classes": (1, 1)}, r"private_classes must be .* no class twice, got \(1, 1\)"),
    (Data, {"private_classes": (-1,)}, "private_classes must be an integer of at least 0, got -1"),
    (Data, {"split": "writers", "evaluate_on": "validation"}, "evaluate_on must be test with writers, .*"),
    (Experiment, {"networks": ()}, "networks must be a list of names, one per client, got 'none'"),
    (Experiment, {"networks": "mlp"}, "networks must be a list of names, one per client, got 'mlp'"),
    (Experiment, {"num_rounds": "x"}, "num_rounds must be an integer of at least 0, got 'x'"),
    (Experiment, {"subset_size": 5001}, "subset_size must be at most the public dataset, .* 5000 .*, got 5001"),
    (Experiment, {"availability": (0.5, 1.5)}, "availability must be between 0 and 1, got 1.5"),
    (Experiment, {"completion": (float("nan"),)}, "completion must be between 0 and 1, got nan"),
    (Experiment, {"completion": (1.0,) * 3}, "completion must be 1 or 2 numbers for 2 clients, got 3"),
    (Experiment, {"score_clip": 0.0}, "score_clip must be positive and finite, got 0.0"),
    (Experiment, {"devices": "many"}, "devices must be an integer of at least 1, got 'many'"),
    (Experiment, {"clients_per_chunk": 0}, "clients_per_chunk must be an integer of at least 1, got 0"),
    (Experiment, {"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
    (Experiment, {"weights": (1.0,)}, "weights must be 2 numbers for 2 clients, got 1"),
    (Experiment, {"weights": (1.0, -1.0)}, "weights must be finite and not negative, got -1.0"),
    (Experiment, {"temperature": 0.0, "distance": "kl"}, "temperature must be positive and finite, got 0.0"),
    (Experiment, {"temperature": 2.0}, "temperature is of distance kl, but distance is mae, got 2.0"),
    (Experiment, {"head_penalty": float("inf")}, "head_penalty must be finite and not negative, got inf"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), OUT_OF_RANGE)
def test_settings_out_of_range(kind, settings, message):
    networks = {"networks": NETWORKS} if kind is Experiment else {}
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**{**networks, **settings})


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


@pytest.mark.parametrize("name", ["letters-iid", "letters-writers"])
def test_what_is_tuned_sends_no_more_than_the_paper_does(name):
    paper, tuned = EXPERIMENTS[name], EXPERIMENTS[f"{name}-tuned"]
    names = ("private_training", "digest", "revisit")
    names += ("batch_statistics", "subset_augmentation", "learning_rate_decay")
    assert dataclasses.replace(paper, **{each: getattr(tuned, each) for each in names}) == tuned


@pytest.mark.parametrize("name", ["letters-iid", "letters-writers", "cifar-iid", "cifar-superclass"])
def test_only_what_is_tuned_has_the_batch_statistics_of_the_public_subset(name):
    experiments = [EXPERIMENTS[f"{name}{variant}"] for variant in ("", "-released", "-tuned")]
    assert [each.batch_statistics for each in experiments] == ["moving", "moving", "public"]
    if name.startswith("cifar"):  # and nothing else is tuned
        assert dataclasses.replace(experiments[0], batch_statistics="public") == experiments[2]


def test_one_probability_for_all_or_one_each():
    assert Experiment(networks=NETWORKS).probabilities() is None
    assert Experiment(networks=NETWORKS, availability=(0.5,), completion=(1.0, 0.25)).probabilities() == {
        "availability": {0: 0.5, 1: 0.5},
        "completion": {0: 1.0, 1: 0.25},
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_come_back_from_json(name):
    experiment = EXPERIMENTS[name]
    assert settings_from(Experiment, json.loads(json.dumps(dataclasses.asdict(experiment)))) == experiment


@pytest.mark.parametrize("devices", [None, 3, "all"])
def test_a_setting_of_several_types_comes_back(devices):
    content = {**dataclasses.asdict(EXPERIMENTS["quickstart"]), "devices": devices}
    assert settings_from(Experiment, json.loads(json.dumps(content))).devices == devices
    with pytest.raises(ValueError, match=r"settings\.devices must be of type"):
        settings_from(Experiment, json.loads(json.dumps({**content, "devices": "some"})))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
NAMES = [
    *((field.name,) for field in dataclasses.fields(Experiment)),
    *(("data", field.name) for field in dataclasses.fields(EXPERIMENTS["quickstart"].data)),
    *(("digest", field.name) for field in dataclasses.fields(EXPERIMENTS["quickstart"].digest)),
]


def has(settings, content):
    """Whether settings are those of the content; one that is missing there has its default."""
    if isinstance(settings, dict) and isinstance(content, dict):
        return all(has(settings[name], value) for name, value in content.items())
    return settings == content


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), JSON), min_size=1, max_size=2))
@example([(("data",), {})])
def test_settings_of_any_content_are_settings_or_refused_in_a_line(changes):
    content = json.loads(json.dumps(dataclasses.asdict(EXPERIMENTS["quickstart"])))
    for (*folders, name), value in changes:
        place = content
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[name] = value
    with contextlib.suppress(ValueError):  # and nothing else
        experiment = settings_from(Experiment, content)
        assert has(json.loads(json.dumps(dataclasses.asdict(experiment))), content)
