import dataclasses
import operator
import re
import typing

import pytest

from fedmd_jax.cli import main
from fedmd_jax.experiments import EXPERIMENTS, Experiment, session, smoke
from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.options import Defaults, Sweep, parse, setting_options, variant_name


@pytest.fixture
def run_help(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("the help reads no data")

    monkeypatch.setattr(session, "prepare", refuse)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["run", "quickstart", "--num-rounds", "3", "--help"]) == 0
    return capsys.readouterr().out


def test_the_help_of_run_explains_every_setting(run_help):
    assert max(map(len, run_help.splitlines())) <= 100
    words = " ".join(re.sub(", --no-[a-z]+", "", run_help.replace("│", " ")).split())
    for option in (*setting_options(Experiment), *setting_options(Defaults), "--out", "--seeds"):
        _, found, after = words.partition(f" {option}")
        assert found, option
        explanation = after.split(" --")[0].partition("(default: ")[0]
        assert len(explanation.split()) >= 3, option
    for word in ("consensus", "digest", "revisit", "public dataset", "private", "Transfer learning", *EXPERIMENTS):
        assert word in words


def test_the_help_of_sweep_has_its_own_options(capsys):
    assert main(["sweep", "letters-iid", "--smoke", "-h"]) == 0
    out = capsys.readouterr().out
    for option in ("--over STR", "--variant {paper,released,tuned}", "--smoke", "--weights {None}|"):
        assert re.search(rf"^\W*{re.escape(option)}", out, re.MULTILINE)


def test_every_setting_is_documented_in_its_class():
    for kind in (Experiment, Experiment.__dataclass_fields__["data"].type):
        for field in dataclasses.fields(kind):
            assert f"\n      {field.name}: " in kind.__doc__


def type_of(option):
    kind = Experiment
    for name in option.removeprefix("--").replace("-", "_").split("."):
        kind = typing.get_type_hints(kind)[name]
    return kind


def value_of(experiment, option):
    return operator.attrgetter(option.removeprefix("--").replace("-", "_"))(experiment)


OPTIONAL = [option for option in setting_options(Experiment) if type(None) in typing.get_args(type_of(option))]


@pytest.mark.parametrize("option", OPTIONAL)
def test_what_is_optional_can_be_unset(option):
    given = {"--data.data-dir": ["/somewhere"], "--pretrained-dir": ["/somewhere"], "--clients-per-chunk": ["3"]}
    given["--weights"] = ["1"] * 10
    for phase in ("digest", "revisit"):
        given[f"--{phase}.patience"] = ["0"]
    words = [option, *given.get(option, ["4"])]
    if option == "--private-training.patience":
        words += ["--private-training.monitor", "test"]
    assert value_of(parse("cifar-iid", words).experiment, option) is not None
    assert value_of(parse("cifar-iid", [*words, option, "None"]).experiment, option) is None


@pytest.mark.parametrize("option", sorted({*setting_options(Experiment)} - {*OPTIONAL}))
def test_what_is_not_optional_cannot_be_unset(option):
    if type_of(option) is str:  # a word like any other
        assert value_of(parse("quickstart", [option, "None"]).experiment, option) == "None"
    elif option == "--networks":
        assert parse("quickstart", [option, "None"]).experiment.networks == ("None",)
    else:
        with pytest.raises(UsageError, match=r"None"):
            parse("quickstart", [option, "None"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices x", "--devices: wanted None, all or an integer, got 'x'"),
        ("--clients-per-chunk x", "--clients-per-chunk: wanted None or an integer, got 'x'"),
        ("--digest.patience 1.5", "--digest.patience: wanted None or an integer, got '1.5'"),
        ("--weights 1 x", "--weights: wanted None or numbers, got '1', 'x'"),
        ("--seeds x", "--seeds: wanted None or an integer, got 'x'"),
        ("--no-smoke", "unknown option '--no-smoke', perhaps you meant .*--smoke"),
        ("--varriant paper", "unknown option '--varriant', perhaps you meant --variant.*"),
    ],
)
def test_a_value_or_an_option_that_is_none(options, message):
    with pytest.raises(UsageError) as caught:
        parse("quickstart", options.split())
    assert re.fullmatch(message + r" \(see fedmd-jax run quickstart --help\)", str(caught.value))


def test_other_networks_need_no_weights():
    experiment = parse("cifar-iid", ["--networks", "mlp", "resnet8", "--weights", "None"]).experiment
    assert (experiment.networks, experiment.weights) == (("mlp", "resnet8"), None)
    with pytest.raises(UsageError, match="weights must be one per client, 2, or None, got 10"):
        parse("cifar-iid", ["--networks", "mlp", "resnet8"])


@pytest.mark.parametrize("name", ["quickstart", "cifar-iid", "cifar-superclass-released"])
def test_smoke_is_of_the_defaults_only(name):
    settings = parse(name, ["--smoke"])
    assert settings.defaults.smoke
    assert settings.experiment == smoke(EXPERIMENTS[name])
    wider = parse(name, ["--num-rounds", "7", "--smoke", "--width", "0.25"]).experiment
    assert wider == dataclasses.replace(settings.experiment, num_rounds=7, width=0.25)


@pytest.mark.parametrize("words", [["--variant", "released"], ["--variant=released"]])
def test_a_variant_is_an_experiment_of_its_own(words):
    for kind_words in ([], ["--seed", "3"]):
        settings = parse("letters-iid", [*kind_words, *words], kind=Sweep)
        same = parse("letters-iid-released", kind_words, kind=Sweep)
        assert settings == same
        assert settings.experiment == dataclasses.replace(
            EXPERIMENTS["letters-iid-released"], seed=settings.experiment.seed
        )


def test_every_variant_has_a_name():
    for name in EXPERIMENTS:
        assert variant_name(name, parse(name, []).defaults.variant) == name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["letters-iid", "--variant", "x"], "invalid choice 'x' for argument '--variant'.*paper.*released.*"),
        (["cifar-iid-released", "--variant=paper"], "cifar-iid-released is a variant already, .* of cifar-iid"),
        (["letters-iid", "--variant"], "Missing value for argument '--variant'.*"),
        (["--variant=releasd", "letters-iid"], "invalid choice 'releasd' for argument '--variant'.*"),
        (["--variant=released"], "quickstart has no variant released"),
        (["letters-iid-released", "--variant", "tuned"], "letters-iid-released is a variant already, .*"),
        (["cifar-iid", "--variant", "tuned"], "cifar-iid has no variant tuned"),
    ],
)
def test_a_variant_that_is_none(argv, message, capsys):
    assert main(["run", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"fedmd-jax: error: {message}\n", err), err
