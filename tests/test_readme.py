"""The program in the README runs and learns; promises name their tests."""

import pathlib
import re

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_program_of_the_readme_runs_and_learns(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    variables = {}
    exec(compile(program, "README.md", "exec"), variables)
    history = variables["history"]
    assert len(history) == 11
    assert history[-1].mean_accuracy > history[0].mean_accuracy + 0.1
    assert capsys.readouterr().out.startswith("[")


def test_every_promise_has_a_test_that_exists():
    root = pathlib.Path(__file__).parents[1]
    table = (root / "benchmarks" / "README.md").read_text().split("## Promises")[1]
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(promised) > 20
    for path, name in promised:
        assert f"\ndef {name}(" in (root / path).read_text(), f"{path} has no {name}"
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    assert all("::test_" in row for row in rows)
