"""The documentation is in step with the package; `.ci/run` builds it."""

import ast
import pathlib
import re

import pytest

import fedmd_jax
from fedmd_jax.cli import main

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))


def test_every_name_of_the_front_door_is_listed():
    tree = ast.parse(pathlib.Path(fedmd_jax.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "fedmd_jax"]
    names = {alias.asname for node in imports for alias in node.names}
    listed = re.findall(r"^   ~[\w.]+\.(\w+)$", (DOCS / "api" / "fedmd_jax.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(names)


def test_the_readme_is_short():
    readme = (DOCS.parent / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1200


def test_the_help_in_the_documentation_is_that_of_the_program(capsys):
    assert main(["run", "--help"]) == 0
    assert capsys.readouterr().out == (DOCS / "images" / "run_help.txt").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_for_colab_are_those_of_the_documentation(path):
    jupytext = pytest.importorskip("jupytext")
    source, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_readme_links_every_notebook(path):
    assert f"/blob/main/docs/notebooks/{path.stem}.ipynb)" in (DOCS.parent / "README.md").read_text()
