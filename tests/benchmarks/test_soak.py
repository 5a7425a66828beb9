"""The checks of the soak find lost and changed results."""

import json

import jax
import jax.numpy as jnp
import pytest
import soak
import toys

FAULTS = ("dropped", "straggler", "scores not finite", "revisit not finite")


def lines():
    return [
        {
            "round": round_,
            "client_id": client_id,
            "accuracy": 0.5,
            "digest_loss": 0.1 if round_ else None,
            "revisit_loss": 0.2 if round_ else None,
            "status": FAULTS[round_ % 4] if round_ % 7 == 1 else "ok",
        }
        for round_ in range(soak.NUM_ROUNDS + 1)
        for client_id in range(len(soak.NETWORKS))
    ]


def write(path, records, num_done=soak.NUM_ROUNDS):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "summary.json").write_text(json.dumps({"num_rounds_done": num_done, "interrupted": False}))
    return path


def problems(tmp_path, records, *, done=b"", num_done=soak.NUM_ROUNDS, is_moved=False):
    found = soak.Soak(tmp_path, seed=0)
    calm, path = write(tmp_path / "calm", lines()), write(tmp_path / "run", records, num_done)
    found._check_end(path, done, calm, is_moved=is_moved)
    return " ".join(found.problems)


def test_stages_are_read_from_lines():
    for title in soak.STAGES:
        assert soak.stage_of(f"{title} ...\n") == title
    public = "transfer learning: public data"
    assert soak.stage_of(f"{public}, network 2 of 3 ...\n") == public
    assert soak.stage_of("round 1/2  accuracy 0.500\n") is None


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_run_equal_to_the_uninterrupted_run_passes(tmp_path, is_moved):
    assert problems(tmp_path, lines(), is_moved=is_moved) == ""


def changed(place, **values):
    records = lines()
    records[place] |= values
    return records


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        (lines()[:-1], "not every client has one line for every round"),
        (lines()[:8] + lines()[4:], "not every client has one line for every round"),
        ([{**line, "status": "ok"} for line in lines()], "too few faults"),
        (changed(9, accuracy=0.51), "not the bytes"),
    ],
)
def test_lost_and_changed_lines_are_found(tmp_path, records, problem):
    assert problem in problems(tmp_path, records)


def test_changed_finished_rounds_and_missing_rounds_are_found(tmp_path):
    found = problems(tmp_path, lines(), done=b'{"round": 1}', num_done=3)
    assert "lines of finished rounds have changed" in found
    assert "the summary is of fewer rounds" in found


def test_a_run_that_changed_devices_may_differ_by_rounding_only(tmp_path):
    image = 1 / soak.NUM_TEST
    fine = changed(9, accuracy=0.5 + image, digest_loss=0.1 * (1 + 1e-4))
    bad = {"a loss is": {"digest_loss": None}, "away": {"revisit_loss": 0.21}, "where it was": {"status": "dropped"}}
    assert problems(tmp_path, fine, is_moved=True) == ""
    for number, (problem, values) in enumerate([*bad.items(), ("away", {"accuracy": 0.5 + 2 * image})]):
        (tmp_path / str(number)).mkdir()
        assert problem in problems(tmp_path / str(number), changed(9, **values), is_moved=True)


def test_missing_lines_that_a_checkpoint_counts_are_found(tmp_path):
    found, path = soak.Soak(tmp_path, seed=0), write(tmp_path / "run", lines())
    content = (path / "metrics.jsonl").read_bytes()
    folder = path / "checkpoints" / "rounds" / "3"
    folder.mkdir(parents=True)
    metadata = {"custom_metadata": {"record": {"num_bytes": [len(content) - 9]}}}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    assert soak._last_checkpoint(path) == 3
    assert found._check_kept(path, content[:5]) == content[:-9]
    assert not found.problems
    (path / "metrics.jsonl").write_bytes(content[:-10])
    found._check_kept(path, content[:5])
    assert "lines are gone" in found.problems[0]


def test_faults_depend_on_keys_and_public_subsets():
    network = soak.faulty(toys.linear())
    inputs = jax.random.normal(jax.random.key(1), (40, soak.SUBSET, *toys.public().inputs.shape[1:]))
    params, state = network.init(jax.random.key(0), inputs[0])

    def broken(inputs, *, train, key=None):
        return jnp.isnan(network.apply(params, state, inputs, train=train, key=key)[0]).all()

    scores = jax.jit(jax.vmap(lambda inputs: broken(inputs, train=False)))
    assert 0 < scores(inputs).sum() < 15
    assert not scores(inputs[:, 1:]).any()
    steps = jax.jit(jax.vmap(lambda key: broken(inputs[0], train=True, key=key)))
    assert 0 < steps(jax.random.split(jax.random.key(2), 2000)).sum() < 50
