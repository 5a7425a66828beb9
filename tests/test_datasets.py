"""What networks give, before anything is computed."""

import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx

import fedmd_jax as fmd
from fedmd_jax.simulation.federation_data import num_outputs

X = jnp.ones((2, 5))


class Structured(nn.Module):
    """Gives its scores and more."""

    how: str

    @nn.compact
    def __call__(self, x):
        features = nn.Dense(4)(x)
        logits = nn.Dense(3)(features)
        return {
            "tuple": (logits, features),
            "dict": {"logits": logits},
            "nested": {"out": [logits, {"features": features}]},
            "list": [logits],
            "none": None,
            "logits": logits,
        }[self.how]


class NnxStructured(nnx.Module):
    def __init__(self, *, rngs):
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x), x


def groups(architecture):
    return {"good": group(Structured("logits")), "odd": fmd.ArchitectureGroup(architecture, (1,))}


def group(module):
    return fmd.ArchitectureGroup(fmd.architecture_from_linen(module), (0,))


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        (lambda: fmd.architecture_from_linen(Structured("tuple")), r"\(\(2, 3\), \(2, 4\)\)"),
        (lambda: fmd.architecture_from_linen(Structured("dict")), r"{'logits': \(2, 3\)}"),
        (lambda: fmd.architecture_from_linen(Structured("nested")), r"{'out': \[\(2, 3\), {'features': \(2, 4\)}\]}"),
        (lambda: fmd.architecture_from_linen(Structured("list")), r"\[\(2, 3\)\]"),
        (lambda: fmd.architecture_from_linen(Structured("none")), "None"),
        (lambda: fmd.architecture_from_nnx(NnxStructured), r"\(\(2, 3\), \(2, 5\)\)"),
    ],
)
def test_logits_alone_are_wanted(architecture, shapes):
    message = rf"group 'odd': the network must give logits \[B, C\] alone, floats .*, got {shapes}: wrap it"
    with pytest.raises(ValueError, match=message) as caught:
        num_outputs(groups(architecture()), X)
    assert "\n" not in str(caught.value)


class Wrong(nn.Module):
    error: type

    def __call__(self, x):
        raise self.error("my own words")


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, ZeroDivisionError])
def test_what_a_network_raises_is_shown(error):
    with pytest.raises(error, match="my own words") as caught:
        num_outputs(groups(fmd.architecture_from_linen(Wrong(error))), X)
    assert "group 'odd': raised by the network for inputs float32 of shape (2, 5)" in caught.value.__notes__


def test_a_shape_that_flax_refuses_is_told_in_its_words():
    narrow = fmd.architecture_from_nnx(lambda rngs: nnx.Linear(3, 4, rngs=rngs))
    with pytest.raises(TypeError, match="contracting dimensions") as caught:
        num_outputs(groups(narrow), X)
    assert any("group 'odd'" in note for note in caught.value.__notes__)
