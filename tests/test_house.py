"""The house of the design: imports point down only, flax stays in `models/`, and the front door has no secrets."""

import ast
import pathlib

import pytest

import fedmd_jax

PACKAGE = pathlib.Path(fedmd_jax.__file__).parent
# From the ground up; a module imports only from lower floors, or from its own package.
FLOORS = [
    {"types", "hints"},
    {"checks"},
    {"losses", "optimizers", "stopping", "subset", "data", "packing", "placement", "processes", "isolation"},
    {"models"},
    {"local", "clients", "mapping", "spread"},
    {"cohorts", "evaluate", "communication", "datasets", "devices"},
    {"attendance", "metrics", "consensus"},
    {"round"},
    {"federation"},
    {"population"},
    {"experiments"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py") or path.parent != PACKAGE
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


def room(name):
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "flax" or here == "models", f"{name} imported outside models/"
        if name == "fedmd_jax":
            assert FLOOR[here] > FLOOR["federation"], "only the upper floors use the front door"
        elif top == "fedmd_jax" and room(name) != here:
            assert FLOOR[room(name)] < FLOOR[here], f"{here} imports {name} from above or beside"


def test_the_front_door_lists_what_it_has_and_documents_it():
    public = {name for name in vars(fedmd_jax) if not name.startswith("_")}
    modules = {name for name in public if getattr(fedmd_jax, name).__class__.__name__ == "module"}
    assert public - modules == set(fedmd_jax.__all__)
    assert fedmd_jax.__all__ == sorted(fedmd_jax.__all__)
    for name in fedmd_jax.__all__:
        assert getattr(fedmd_jax, name).__doc__, f"{name} has no docstring"


# What runs, or may run, what a file says.
UNSAFE = {"eval", "exec", "__import__", "literal_eval"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "ctypes"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_is_run(path):
    assert not {name.split(".")[0] for name in imports(path)} & UNSAFE_MODULES
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        is_of_module = isinstance(node.func, ast.Attribute)
        # `module.eval()` of nnx is a mode of its networks.
        assert called not in UNSAFE or (is_of_module and called == "eval" and path.name == "from_nnx.py")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        of_numpy = is_of_module and ast.unparse(node.func.value) in ("np", "numpy")
        assert keywords.get("allow_pickle", "True" if of_numpy and called == "load" else "False") == "False"
