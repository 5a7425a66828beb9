"""Versions: one of this package, and those of what it needs."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fedmd_jax

ROOT = pathlib.Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints"
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def pinned(name):
    """The versions of a constraints file, by package."""
    lines = (CONSTRAINTS / name).read_text().splitlines()
    pairs = [line.partition("#")[0].strip().split("==") for line in lines if "==" in line]
    return {package: Version(version) for package, version in pairs}


def test_there_is_one_version_number():
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    versions = {fedmd_jax.__version__, importlib.metadata.version("fedmd_jax"), changelog[1], citation[1]}
    assert versions == {fedmd_jax.__version__}


def test_the_oldest_versions_are_the_floors():
    floors = {}
    for requirement in map(Requirement, DEPENDENCIES):
        for bound in requirement.specifier:
            floors[requirement.name] = Version(bound.version)
    oldest = pinned("oldest.txt")
    assert oldest.pop("jaxlib") == oldest["jax"]
    assert floors == {name: oldest[name] for name in floors}


def test_the_versions_of_colab_are_allowed():
    colab = pinned("colab.txt")
    for requirement in map(Requirement, DEPENDENCIES):
        assert requirement.name not in colab or colab[requirement.name] in requirement.specifier


@pytest.mark.index
def test_installing_the_wheel_leaves_colab_as_it_is(tmp_path):
    """The program of the wheel then runs as in a notebook: with the plots of matplotlib going to its page."""
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    versions = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"

    def run(*command, **environment):
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def installed():
        return json.loads(run(str(python), "-I", "-c", versions))

    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(*pip, "install", "--requirement", str(CONSTRAINTS / "colab.txt"))
    before = installed()
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    run(*pip, "install", *map(str, tmp_path.glob("*.whl")))
    after = installed()
    assert before == {name: after[name] for name in before}

    program = str(python.with_name("fedmd-jax"))
    backend = "module://matplotlib_inline.backend_inline"
    output = run(program, "run", "--smoke", "--out", "run", MPLBACKEND=backend, PYTHONPATH="")
    assert re.search(r"^ +mean  ", output, re.MULTILINE)  # the table
    assert (tmp_path / "run" / "accuracy.png").stat().st_size > 0
