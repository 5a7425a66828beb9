import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toys

from fedmd_jax.datasets import labelled_dataset
from fedmd_jax.experiments.ahead import Ahead, compiling
from fedmd_jax.experiments.stopwatch import Stopwatch


@pytest.fixture
def data():
    return {
        "public": toys.public(),
        "private": toys.private(toys.groups()),
        "pooled": labelled_dataset(*toys.examples(1, 9)),
        "test": labelled_dataset(*toys.examples(2, 5)),
    }


class Immediately:
    """An executor without threads, which remembers how much it was given."""

    def __init__(self, *_, **__):
        self.num_jobs = 0

    def submit(self, job):
        self.num_jobs += 1
        result = job()
        return type("Done", (), {"result": lambda self: result})()

    def shutdown(self, **_):
        pass


def test_the_result_is_that_of_the_function():
    watch = Stopwatch()
    fn = jax.jit(lambda key, x: x + jax.random.uniform(key, x.shape))
    args = (jax.random.key(0), jnp.arange(3.0))
    ahead = Ahead(Immediately(), watch, "rounds", fn)
    ahead.begin(*args)
    assert watch.seconds()["rounds"] == 0
    assert (ahead(*args) == fn(*args)).all()
    assert (ahead(args[0], args[1] + 1) == fn(args[0], args[1] + 1)).all()
    assert watch.seconds()["rounds"] > 0


def test_an_error_of_the_compiler_is_raised_where_the_program_is_called(data):
    def broken(*_):
        raise RuntimeError("broken")

    federation = dataclasses.replace(toys.federation(toys.groups()), evaluate=jax.jit(broken))
    with (
        compiling(federation, Stopwatch(), needed={"evaluate"}, **data) as compiled,
        pytest.raises(RuntimeError, match="broken"),
    ):
        compiled.evaluate(None, data["test"])


def test_only_what_is_needed_is_compiled(data, monkeypatch):
    executor = Immediately()
    monkeypatch.setattr("fedmd_jax.experiments.ahead.ThreadPoolExecutor", lambda **_: executor)
    federation = toys.federation(toys.groups())
    with compiling(federation, Stopwatch(), needed={"new_states", "evaluate"}, **data) as compiled:
        assert executor.num_jobs == 2
        assert compiled.round is federation.round
        states = compiled.new_states(jax.random.key(1), data["public"].inputs[:1])
        ours, theirs = (each.evaluate(states, data["test"]) for each in (compiled, federation))
        for name in toys.groups():
            assert (ours[name].accuracy == theirs[name].accuracy).all()


def test_other_shapes_are_compiled_for_once():
    executor = Immediately()
    ahead = Ahead(executor, Stopwatch(), "rounds", jax.jit(lambda x: 2 * x))
    ahead.begin(jnp.arange(3.0))
    for _ in range(2):
        assert ahead(jnp.arange(4.0)).tolist() == [0, 2, 4, 6]
        assert ahead(jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert executor.num_jobs == 2
