"""What `fedmd-jax list` prints: experiments, algorithms, networks and data sets, a line each."""

import inspect
from collections.abc import Mapping

from fedmd_jax.data.listing import titles
from fedmd_jax.experiments.algorithms import ALGORITHMS, option_defaults
from fedmd_jax.experiments.networks import KINDS
from fedmd_jax.experiments.presets import EXPERIMENTS
from fedmd_jax.experiments.settings import Experiment


def overview() -> str:
    """Experiments, algorithms, networks and data sets with the options that take their names."""
    sections = {
        "experiments: fedmd-jax run NAME": {name: _experiment(each) for name, each in EXPERIMENTS.items()},
        "algorithms: --algorithm NAME --algorithm.OPTION VALUE": {name: _algorithm(name) for name in ALGORITHMS},
        "networks: --networks NAME NAME ... with a name for each client, --server-network NAME": KINDS,
        "data sets: --data.public NAME --data.private NAME; fedmd-jax data list says more": titles(),
    }
    return "\n\n".join("\n".join([f"{title}", *_lines(entries)]) for title, entries in sections.items())


def _lines(entries: Mapping[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {name:<{width}}  {text}" for name, text in entries.items()]


def _experiment(experiment: Experiment) -> str:
    data, networks = experiment.data, experiment.networks
    clients = f"{len(networks)} clients of {len(set(networks))} networks, {experiment.num_rounds} rounds"
    return f"{data.public} is public, {data.private} private, split by {data.split}; {clients}"


def _algorithm(name: str) -> str:
    """The first sentence of its docstring without its name, and its options with their defaults."""
    text = (inspect.getdoc(ALGORITHMS[name]) or "").partition("\n")[0].partition(": ")[2]
    options = ", ".join(f"{option.replace('_', '-')} {value}" for option, value in option_defaults(name).items())
    return f"{text.rstrip('.')} ({options})" if options else text.rstrip(".")
