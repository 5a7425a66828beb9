"""Do the numbers agree with those of the authors' own implementation?

    python benchmarks/reference_agreement.py FILE.npz [--json]

The file holds networks, their weights and what the released Keras code computes with them on fixed inputs, without
shuffling and dropout (`tests/golden/README.md` describes it). The script builds these networks, loads the weights,
runs the rounds with the library's functions and prints the largest deviation of each stage and its tolerance. The
exit code is 1 if a deviation exceeds its tolerance, and 2 if the file cannot be used.
"""

import argparse
import json
import pathlib
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import fedmd_jax as fmd
from fedmd_jax.experiments.networks import architecture_from_name

# Largest absolute deviation by stage, from the README of the golden file. Rounding alone changes the reference, since
# Adam turns noise in gradients that are exactly zero, those of biases before batch-norm, into whole steps.
TOLERANCES = {
    "probe/train_logits": 1e-5,
    "probe/mae_to_ones": 1e-5,
    "probe/loss_to_ones": 1e-5,
    "probe/grad": 1e-5,
    "round1/scores": 1e-5,
    "round1/consensus": 1e-5,
    "round1/digest_loss": 1e-4,
    "round1/revisit_loss": 1e-4,
    "round2/scores": 2e-2,
    "round2/consensus": 2e-2,
    "final/test_logits": 2e-2,
    "final/test_logits by fedmd_round": 2e-2,
}
LEARNING_RATE = 1e-3


class Deviation(NamedTuple):
    """Largest deviation of a stage from the reference."""

    stage: str
    largest: float
    tolerance: float | None  # None: reported only

    @property
    def within(self) -> bool:
        """Whether the deviation is at most the tolerance; NaN is not."""
        return self.tolerance is None or self.largest <= self.tolerance


class BadFileError(ValueError):
    """The file does not have the form that the README of the golden file describes."""


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the file; images get their channel axis."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise BadFileError(f"cannot read {path}: {error}") from None
    for name, array in arrays.items():
        if name.split("/")[-1] in ("x_public", "x_test", "x_private") and array.ndim == 3:
            arrays[name] = array[..., None]
    return arrays


def tree(arrays: Mapping[str, np.ndarray], prefix: str, leaves: tuple[str, ...]) -> dict[str, dict[str, jax.Array]]:
    """The arrays `prefix/layer/leaf` of these leaves as nested dictionaries."""
    nested: dict[str, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        layer, _, leaf = name.removeprefix(prefix + "/").partition("/")
        if name.startswith(prefix + "/") and leaf in leaves:
            nested.setdefault(layer, {})[leaf] = jnp.asarray(array)
    return nested


def params_of(arrays, prefix):
    """The trainable weights below a prefix."""
    return tree(arrays, prefix, ("kernel", "bias", "scale"))


class Replay:
    """The federation that the file describes: one group per architecture, no shuffling, no dropout."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        config = {name.removeprefix("config/"): value for name, value in arrays.items() if name.startswith("config/")}
        self.num_rounds, num_classes = int(config["rounds"]), int(config["n_classes"])
        self.batch_digest = int(config["batch_digest"])
        in_order = partial(fmd.TrainingConfig, optimizer=fmd.adam(LEARNING_RATE), shuffle=False)
        self.digest_training = in_order(num_epochs=int(config["epochs_digest"]), batch_size=self.batch_digest)
        self.revisit_training = in_order(
            num_epochs=int(config["epochs_revisit"]), batch_size=int(config["batch_revisit"])
        )
        names = [str(name) for name in config["architectures"]]
        if len(names) != int(config["n_clients"]):
            raise BadFileError(f"{int(config['n_clients'])} clients, but {len(names)} architectures")
        self.groups = {
            name: fmd.ArchitectureGroup(
                architecture_from_name(name, num_classes, head_penalty=1e-3, dropout=0.0),
                [k for k, other in enumerate(names) if other == name],
            )
            for name in dict.fromkeys(names)
        }
        self.public = jnp.asarray(arrays["x_public"])
        self.private = fmd.stack_private(
            self.groups,
            {k: (arrays[f"client{k}/x_private"], arrays[f"client{k}/y_private"]) for k in range(len(names))},
        )

    def states(self) -> dict[str, fmd.ClientState]:
        """The file's initial weights and new optimizer states, stacked by group."""
        return {
            name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(self._client, group.client_ids))
            for name, group in self.groups.items()
        }

    def _client(self, k):
        params = params_of(self.arrays, f"client{k}/init")
        statistics = tree(self.arrays, f"client{k}/init", ("mean", "var"))
        return fmd.ClientState(
            params,
            {"batch_stats": statistics},
            self.digest_training.optimizer.init(params),
            self.revisit_training.optimizer.init(params),
        )

    def score(self, states, inputs):
        """Scores [K, M, C] per group."""
        return {
            name: fmd.mapping.map_clients(partial(fmd.score, group.architecture), (0, None))(states[name], inputs)
            for name, group in self.groups.items()
        }

    def digest(self, states, consensus):
        """Digests with every client; states and losses per group."""
        results = {
            name: fmd.mapping.map_clients(
                partial(fmd.digest, group.architecture, training=self.digest_training), (0, None, None, 0)
            )(states[name], self.public, consensus, self._keys(group))
            for name, group in self.groups.items()
        }
        return split_results(results)

    def revisit(self, states):
        """Revisits with every client; states and losses per group."""
        results = {
            name: fmd.mapping.map_clients(
                partial(fmd.revisit, group.architecture, training=self.revisit_training), (0, 0, 0)
            )(states[name], self.private[name], self._keys(group))
            for name, group in self.groups.items()
        }
        return split_results(results)

    def _keys(self, group):
        return fmd.mapping.client_keys(jax.random.key(0), group.client_ids)  # nothing is random here

    def whole_round(self, states):
        """Runs the round by `fedmd_round`."""
        public = fmd.PublicDataset(self.public, None)
        return fmd.fedmd_round(
            states,
            public,
            self.private,
            jax.random.key(0),
            groups=self.groups,
            subset_size=self.public.shape[0],
            draw_subset=fmd.algorithms.first_examples,
            digest_training=self.digest_training,
            revisit_training=self.revisit_training,
        )[0]

    def by_client(self, per_group):
        """Converts trees per group [K, ...] to a list of one per client."""
        clients = {
            client_id: jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), per_group[name])
            for name, group in self.groups.items()
            for k, client_id in enumerate(group.client_ids)
        }
        return [clients[k] for k in sorted(clients)]


def split_results(results):
    """Splits name -> (state, loss) into two dictionaries."""
    return {name: state for name, (state, _) in results.items()}, {name: loss for name, (_, loss) in results.items()}


class Found(NamedTuple):
    """A computed value and the name of its reference."""

    stage: str
    name: str  # of the array in the file
    value: chex.Array


def replayed(arrays: Mapping[str, np.ndarray]) -> Iterator[Found]:
    """Yields everything that can be compared with the file, in the order of the procedure."""
    replay = Replay(arrays)
    yield from probe(replay)
    yield from rounds(replay)


def probe(replay: Replay) -> Iterator[Found]:
    """Yields loss and gradients on the first digest batch with targets of one, in training mode."""
    images, states = replay.public[: replay.batch_digest], replay.by_client(replay.states())
    architectures = {k: group.architecture for group in replay.groups.values() for k in group.client_ids}
    for k, state in enumerate(states):
        if f"client{k}/probe/loss_to_ones" not in replay.arrays:
            continue

        def loss(params, architecture=architectures[k], model_state=state.model_state):
            logits, _ = architecture.apply(params, model_state, images, train=True, key=jax.random.key(0))
            error = jnp.mean(fmd.mae(logits, jnp.ones_like(logits)))
            return error + architecture.penalty(params), (logits, error)

        (total, (logits, error)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
        for name, value in {"train_logits": logits, "mae_to_ones": error, "loss_to_ones": total}.items():
            yield Found(f"probe/{name}", f"client{k}/probe/{name}", value)
        for layer, leaf, value in flattened(gradients):
            yield Found("probe/grad", f"client{k}/probe/grad/{layer}/{leaf}", value)


def rounds(replay: Replay) -> Iterator[Found]:
    """Yields every stage of every round, and the final test scores."""
    states = replay.states()
    score, digest, revisit = map(jax.jit, (replay.score, replay.digest, replay.revisit))
    for r in range(1, replay.num_rounds + 1):
        scores = score(states, replay.public)
        consensus = fmd.weighted_consensus(scores, fmd.algorithms.all_clients(replay.groups).weights)
        yield Found(f"round{r}/scores", f"round{r}/scores", np.stack(replay.by_client(scores)))
        yield Found(f"round{r}/consensus", f"round{r}/consensus", consensus)
        states, infos = digest(states, consensus)
        yield from after_phase(replay, r, "digest", states, infos)
        states, infos = revisit(states)
        yield from after_phase(replay, r, "revisit", states, infos)
    test, name = jnp.asarray(replay.arrays["x_test"]), "final/test_logits"
    yield Found(name, name, np.stack(replay.by_client(score(states, test))))
    states, whole_round = replay.states(), jax.jit(replay.whole_round)
    for _ in range(replay.num_rounds):
        states = whole_round(states)
    yield Found(f"{name} by fedmd_round", name, np.stack(replay.by_client(score(states, test))))


def after_phase(replay, r, phase, states, infos) -> Iterator[Found]:
    """Yields losses and the weights by kind; kinds without a tolerance are dominated by rounding noise."""
    for k, (state, info) in enumerate(zip(replay.by_client(states), replay.by_client(infos), strict=True)):
        yield Found(f"round{r}/{phase}_loss", f"round{r}/client{k}/{phase}_loss", info.loss)
        after = f"after_{phase}{r}"
        for layer, leaf, value in flattened(state.params):
            kind = layer.rstrip("0123456789")
            name = "conv bias" if (kind, leaf) == ("conv", "bias") else kind
            yield Found(f"{after}/{name}", f"client{k}/{after}/{layer}/{leaf}", value)
        for layer, leaf, value in flattened(state.model_state["batch_stats"]):
            yield Found(f"{after}/batch statistics", f"client{k}/{after}/{layer}/{leaf}", value)


def flattened(layers: Mapping[str, Mapping[str, chex.Array]]) -> Iterator[tuple[str, str, chex.Array]]:
    """Yields layer, leaf and value of nested dictionaries."""
    for layer, values in layers.items():
        for leaf, value in values.items():
            yield layer, leaf, value


def distance(found, expected) -> float:
    """Largest absolute difference; infinite if the shapes differ."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(found - expected))) if found.shape == expected.shape else float("inf")


def measure(arrays: Mapping[str, np.ndarray]) -> list[Deviation]:
    """Computes the largest deviation of every stage, in the order of the procedure."""
    largest: dict[str, float] = {}
    try:
        for stage, name, value in replayed(arrays):
            largest[stage] = float(np.maximum(largest.get(stage, 0.0), distance(value, arrays[name])))  # NaN stays
    except KeyError as error:
        raise BadFileError(f"the file has no {error}") from None
    return [Deviation(stage, value, TOLERANCES.get(stage)) for stage, value in largest.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, metavar="FILE.npz")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(argv)
    try:
        deviations = measure(read(options.file))
    except ValueError as error:
        print(f"reference_agreement: error: {error}", file=sys.stderr)
        return 2
    agrees = all(deviation.within for deviation in deviations)
    if options.json:
        stages = [{**deviation._asdict(), "within": deviation.within} for deviation in deviations]
        print(json.dumps({"file": options.file.name, "agrees": agrees, "stages": stages}))
    else:
        for stage, largest, tolerance in deviations:
            bound = "none" if tolerance is None else f"{tolerance:.0e}"
            verdict = "" if tolerance is None or largest <= tolerance else "  TOO FAR"
            print(f"{stage:<34} {largest:>9.1e}  tolerance {bound}{verdict}")
        print("agrees with the reference" if agrees else "DOES NOT AGREE with the reference")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
