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

    # The same federation with clients that come and go; the README leaves out what is above.
    (snippet,) = (text for text in re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL) if "attendance" in text)
    exec(compile(snippet, "README.md", "exec"), variables | {"key_attendance": variables["jax"].random.key(1)})
    assert re.match(r"\[\(\d, \d, '(absent|incomplete)'\)", capsys.readouterr().out)
