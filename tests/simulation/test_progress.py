import io
import subprocess
import sys

import jax
import pytest
import toys

import fedmd_jax as fmd

GROUPS = {"linear": fmd.ArchitectureGroup(toys.linear(), (0, 1))}
FEDERATION = toys.federation(GROUPS)
PUBLIC, PRIVATE = toys.public(), toys.private(GROUPS)
TEST = fmd.labelled_dataset(*toys.examples(200, 10))


def run(monkeypatch, num_rounds=2, **settings):
    """What a run shows, one line per redraw."""
    terminal, key = io.StringIO(), jax.random.key(0)
    monkeypatch.setattr("sys.stderr", terminal)
    states = FEDERATION.init(key, PUBLIC, PRIVATE)
    try:
        fmd.run_federation(FEDERATION, states, PUBLIC, PRIVATE, key, num_rounds=num_rounds, test=TEST, **settings)
    except InterruptedError:
        return terminal.getvalue().split("\r")
    return terminal.getvalue().split("\r")


def test_a_run_is_silent_unless_progress_is_asked_for(monkeypatch):
    assert run(monkeypatch) == [""]


@pytest.mark.parametrize(("first_round", "num_rounds", "end"), [(1, 2, "2/2"), (1, 0, "0round"), (4, 2, "5/5")])
def test_the_bar_says_when_it_compiles_and_ends_full(monkeypatch, first_round, num_rounds, end):
    shown = run(monkeypatch, num_rounds, first_round=first_round, progress=True)
    assert any(line.startswith("compiling ...") for line in shown)
    assert shown[-1].startswith("rounds") or num_rounds == 0
    assert f"{end} [" in shown[-1]


def test_nothing_stays_on_the_screen_after_an_exception(monkeypatch):
    def fail(metrics, states):
        if metrics.round == 1:
            raise InterruptedError

    *_, blank, rest = run(monkeypatch, callback=fail, progress=True)
    assert (blank.strip(), rest) == ("", "")


def test_a_population_has_a_bar_too(monkeypatch):
    terminal, key = io.StringIO(), jax.random.key(0)
    monkeypatch.setattr("sys.stderr", terminal)
    population = fmd.simulation.init_population(FEDERATION, key, PUBLIC, PRIVATE, cohort_size=2)
    settings = {"cohort_size": 2, "num_rounds": 2, "test": TEST, "progress": True}
    _, history = fmd.simulation.run_population(FEDERATION, population, PUBLIC, key, **settings)
    assert isinstance(history, fmd.simulation.History)
    assert "2/2 [" in terminal.getvalue().split("\r")[-1]


NOTEBOOK = """
import sys, types, warnings
from fedmd_jax.simulation.progress import Bar
kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: kernel
sys.modules["ipywidgets"] = None
for name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
    sys.modules.pop(name, None)
warnings.simplefilter("error")
with Bar(3):
    pass
"""


def test_a_notebook_without_ipywidgets_has_a_bar_of_text_and_no_warning():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0/3 [" in done.stderr
