"""Layers: imports point down only, flax is imported in `models/` only, and exported names are documented."""

import ast
import importlib
import inspect
import pathlib

import pytest

import fedmd_jax

PACKAGE = pathlib.Path(fedmd_jax.__file__).parent


# From bottom to top. A module imports only from lower layers, or from its own package.
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
    "plot",
    "loggers",
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
def test_subpackages_and_their_exports_have_docstrings(name):
    package = importlib.import_module(f"fedmd_jax.{name}")
    assert package.__doc__
    for each in exports(package):
        assert not inspect.isroutine(getattr(package, each)) or getattr(package, each).__doc__, (
            f"{each} has no docstring"
        )


def test_the_front_door_is_short_and_documented():
    names = exports(fedmd_jax)
    assert 40 < len(names) < 70
    for name in names:
        assert getattr(fedmd_jax, name).__doc__, f"{name} has no docstring"


PUBLIC_PACKAGES = LAYERS[LAYERS.index("data") : LAYERS.index("plot")]  # what they export is public
PUBLIC_MODULES = ["types", "plot", "loggers"]  # what they define is public
TYPE_ALIASES = {"Aggregator", "Augmentation", "ParticipationPolicy", "Transform"}


def public_objects():
    """Pairs of a name and its object, for all public names."""
    for package in (fedmd_jax, *(importlib.import_module(f"fedmd_jax.{name}") for name in PUBLIC_PACKAGES)):
        yield from ((name, getattr(package, name)) for name in exports(package))
    for module in (importlib.import_module(f"fedmd_jax.{name}") for name in PUBLIC_MODULES):
        for name, each in vars(module).items():
            if getattr(each, "__module__", None) == module.__name__ and not name.startswith("_"):
                yield name, each


def test_public_names_have_examples():
    found = {name: each for name, each in public_objects() if callable(each) and name not in TYPE_ALIASES}
    assert {"fedmd_round", "Architecture", "mae", "resnet8", "confusion_matrix", "TensorBoard"} <= found.keys()
    without = sorted(name for name, each in found.items() if ">>>" not in (each.__doc__ or ""))
    assert not without, f"no example (`>>>`) in the docstrings of {without}"


def exports(package):
    """The names of `from ... import X as X` in the `__init__` of a package, which are its public ones."""
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [alias.asname for alias in aliases if alias.asname]


# Functions and modules that can execute the content of a file.
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
        # `module.eval()` of nnx sets the mode of a network.
        assert called not in UNSAFE or (is_of_module and called == "eval" and path.name == "from_nnx.py")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        of_numpy = is_of_module and ast.unparse(node.func.value) in ("np", "numpy")
        assert keywords.get("allow_pickle", "True" if of_numpy and called == "load" else "False") == "False"
