"""The program in the README runs, is short, and learns."""

import pathlib
import re

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_program_of_the_readme_runs_and_learns(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(program.splitlines()) <= 25
    variables = {}
    exec(compile(program, "README.md", "exec"), variables)
    history = variables["history"]
    assert len(history) == 6
    assert history[-1].mean_accuracy > 0.7  # chance is a third
    assert capsys.readouterr().out.startswith("[")
