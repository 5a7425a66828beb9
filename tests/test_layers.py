"""The layers of the design: imports point down only, flax stays in `models/`, and what is exported is documented."""

import ast
import importlib
import inspect
import pathlib
import types

import pytest

import fedmd_jax

PACKAGE = pathlib.Path(fedmd_jax.__file__).parent


# From the ground up. A module imports only from lower layers, or from its own package.
LAYERS = [
    "types",
    "checks",
    "data",
    "models",
    "mapping",
    "client",
    "transforms",
    "aggregators",
    "algorithms",
    "simulation",
    "experiments",
    "cli",
]
PURE = LAYERS[LAYERS.index("models") : LAYERS.index("simulation")]  # arrays in, arrays out
LAYER = {name: number for number, name in enumerate(LAYERS)}


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


def layer(name):
    """The layer of a module such as `fedmd_jax.client.losses`."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "flax" or here == "models", f"{name} imported outside models/"
        if name == "fedmd_jax":
            assert LAYER[here] > LAYER["simulation"], "only the layers above simulation/ import from fedmd_jax itself"
        elif top == "fedmd_jax" and layer(name) != here:
            assert LAYER[layer(name)] < LAYER[here], f"{here} imports {name} from above"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_layers_have_no_random_state_of_numpy(path):
    if path.relative_to(PACKAGE).parts[0] in PURE:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"np.random", "numpy.random"}


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_subpackage_and_what_it_exports_has_a_docstring(name):
    package = importlib.import_module(f"fedmd_jax.{name}")
    assert package.__doc__
    exported = getattr(package, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert all(getattr(package, each).__doc__ for each in exported if inspect.isroutine(getattr(package, each)))


def test_the_package_lists_what_it_exports_and_documents_it():
    public = {name for name in vars(fedmd_jax) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(fedmd_jax, name), types.ModuleType)}
    assert public - modules == set(fedmd_jax.__all__) - modules
    assert len(set(fedmd_jax.__all__)) == len(fedmd_jax.__all__)
    for name in fedmd_jax.__all__:
        assert getattr(fedmd_jax, name).__doc__, f"{name} has no docstring"


# What runs, or may run, what a file says.
UNSAFE = {"eval", "exec", "__import__", "literal_eval"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "ctypes"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_content_is_executed(path):
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
