import contextlib
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from orbax.checkpoint import v1 as ocp

import fedmd_jax as fmd
from fedmd_jax import checkpoint
from fedmd_jax.checkpoint import CheckpointError, Checkpoints, check_tree, load_tree, read_record, save_tree


def tree(seed=0):
    """Every kind of array that a client may have, on the device and on the host, under names that files cannot have."""
    rng = np.random.default_rng(seed)
    return {
        "2conv:n1=8/x.y [z]": fmd.ClientState(
            {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "empty": jnp.zeros((3, 0))},
            {},
            (jnp.asarray(rng.normal(size=5), jnp.bfloat16), jnp.int32(7)),
            [np.array([True, False]), np.float64(rng.normal()), None],
        ),
        "": {"../up": rng.integers(0, 255, (2, 2), dtype=np.uint8), "h": rng.normal(size=3).astype(ml_dtypes.bfloat16)},
    }


def check_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_what_is_read_is_what_was_written(tmp_path):
    save_tree(tmp_path / "a", tree(), record={"round": 3, "of": [1.5, None]})
    check_same(load_tree(tmp_path / "a", tree()), tree())
    assert read_record(tmp_path / "a") == {"round": 3, "of": [1.5, None]}
    assert names(tmp_path) == ["a"]


def test_a_path_may_be_a_string(tmp_path):
    save_tree(f"{tmp_path}/folder/a", {"w": np.arange(3)}, record={"round": 2})
    np.testing.assert_array_equal(load_tree(f"{tmp_path}/folder/a", {"w": np.zeros(3, int)})["w"], np.arange(3))
    check_tree(f"{tmp_path}/folder/a", {"w": np.zeros(3, int)})
    assert read_record(f"{tmp_path}/folder/a") == {"round": 2}


def test_orbax_is_asked_once_for_what_does_not_change(tmp_path, monkeypatch):
    asked, metadata = [], ocp.metadata
    monkeypatch.setattr(ocp, "metadata", lambda path: asked.append(path.name) or metadata(path))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for round_ in (1, 2, 3):
            checkpoints.save(round_, {"w": np.full(1, round_)}, record={"of": [round_]})
            checkpoints.wait()
            checkpoints.record(round_)["of"].append("whoever asks may do with it what he likes")
            assert checkpoints.record(round_)["of"] == [round_]
            check_same(checkpoints.load(round_, {"w": np.zeros(1, int)}), {"w": np.full(1, round_)})
    assert asked == ["1", "2", "3"]
    description = tmp_path / "3" / "_CHECKPOINT_METADATA"
    description.write_bytes(description.read_bytes().replace(b'"of": [3]', b'"of": [4]'))
    assert read_record(tmp_path / "3")["of"] == [4]
    save_tree(tmp_path / "3", {"w": np.zeros(2)})
    assert "of" not in read_record(tmp_path / "3")


def test_what_others_leave_in_a_checkpoint_is_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.zeros(1)})
        checkpoints.wait()
        (tmp_path / "1" / ".#lock").symlink_to("nobody@nowhere")
        assert checkpoints.latest == 1
        check_same(checkpoints.load(1, {"w": np.zeros(1)}), {"w": np.zeros(1)})


def test_arrays_come_home(tmp_path):
    mesh = fmd.client_mesh()
    states = {
        "host": np.zeros((4, 2), np.float32),
        "device": jnp.zeros((4, 2)),
        "mesh": fmd.shard_clients(jnp.ones((4, 2)), mesh),
    }
    save_tree(tmp_path / "a", states)
    back = load_tree(tmp_path / "a", states)
    back["host"][0] = 1  # of a population, which is written to
    assert isinstance(back["device"], jax.Array)
    assert back["mesh"].sharding == states["mesh"].sharding
    shapes = jax.eval_shape(lambda: dict.fromkeys(states, jnp.zeros((4, 2))))
    assert isinstance(load_tree(tmp_path / "a", shapes)["host"], jax.Array)


def test_what_is_there_is_replaced(tmp_path):
    for seed in range(2):
        save_tree(tmp_path / "a", tree(seed))
    check_same(load_tree(tmp_path / "a", tree()), tree(1))
    assert names(tmp_path) == ["a"]


def test_a_save_has_its_own_copy(tmp_path):
    states = {"w": np.arange(5.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, states)
        states["w"][:] = 0
    assert checkpoints.load(1, states)["w"].tolist() == [0, 1, 2, 3, 4]


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path / "new", keep=2) as checkpoints:
        assert (checkpoints.rounds, checkpoints.latest) == ([], None)
        for round_, score in enumerate([0.1, 0.5, None, 0.3, 0.5, 0.4, 0.2], start=1):
            checkpoints.save(round_, {"w": np.full(2, round_)}, score=score, record={"r": round_})
        checkpoints.wait()
        assert not checkpoints.busy
        assert (checkpoints.rounds, checkpoints.latest) == ([2, 6, 7], 7)
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:  # another process knows the scores, too
        checkpoints.save(10, {"w": np.full(2, 10)}, score=0.45)
    assert checkpoints.rounds == [2, 10]
    assert checkpoints.record(2) == {"score": 0.5, "r": 2}
    assert checkpoints.load(2, {"w": np.zeros(2, int)})["w"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_what_others_have_in_the_folder_stays(tmp_path):
    others = (".git", "2019", "2020", "007", ".3.tmp", ".a.1.tmp", "orbax")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    ocp.save(tmp_path / "1", {"w": np.zeros(3)}, custom_metadata={"epoch": 1})
    (tmp_path / "2").write_text("a file")
    (tmp_path / ".3.99.tmp").mkdir()
    (tmp_path / ".3.99.tmp.orbax-checkpoint-tmp").mkdir()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert (checkpoints.rounds, checkpoints.latest) == ([], None)
        for round_ in (3, 4):
            checkpoints.save(round_, {"w": np.zeros(1)}, score=1 / round_)
        checkpoints.save(5, {"w": np.zeros(1)})
        checkpoints.wait()
        assert checkpoints.rounds == [3, 5]
        for name in ("1", "2", "2019"):
            with pytest.raises(
                OSError, match=f"^cannot write the checkpoint .*/{name}: it would replace what is none, .*$"
            ):
                checkpoints.save(int(name), {"w": np.zeros(1)})
    assert names(tmp_path) == sorted([*others, "1", "2", "3", "5"])
    assert {file: file.read_bytes() for file in before} == before


def test_checkpoints_of_another_format_are_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_tree(tmp_path / "3", {})
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.save(4, {})
    assert checkpoints.rounds == [4]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_round_is_told_of_and_not_removed(tmp_path, damage):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"w": np.zeros(1)})
        checkpoints.wait()
        description = tmp_path / "3" / "_CHECKPOINT_METADATA"
        DAMAGES[damage](description, description.read_bytes())
        assert checkpoints.latest == 3
        with pytest.raises(
            CheckpointError, match=r"3 is damaged: (its description cannot be read .*|it has no description)$"
        ):
            checkpoints.load(3, {"w": np.zeros(1)})
        with pytest.raises(OSError, match=r"3: it would replace what is none, or damaged$"):
            checkpoints.save(3, {"w": np.zeros(1)})
        for round_ in (4, 5):
            checkpoints.save(round_, {"w": np.zeros(1)})
    assert checkpoints.rounds == [3, 5]


@pytest.mark.parametrize(("back_to", "left"), [(13, [10, 13]), (12, [10, 12]), (11, [10, 11]), (10, [10]), (1, [1])])
def test_who_goes_back_leaves_what_came_after(tmp_path, back_to, left):
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for round_, score in {10: 0.5, 11: 0.1, 12: 0.2, 13: 0.9}.items():
            checkpoints.save(round_, {"w": np.full(2, round_)}, score=score)
    assert checkpoints.rounds == [10, 11, 12, 13]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(back_to, {"w": np.full(2, -1)}, score=0.3)
    assert (checkpoints.rounds, checkpoints.latest) == (left, back_to)
    assert checkpoints.load(back_to, {"w": np.zeros(2, int)})["w"].tolist() == [-1, -1]


def test_what_came_after_stays_until_the_new_round_is_written(tmp_path):
    states = {"w": np.arange(30_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, states)
        checkpoints.wait()
        with full_disk(300):
            checkpoints.save(3, states)
            with pytest.raises(OSError, match="cannot write the checkpoint"):
                checkpoints.wait()
    check_same(checkpoints.load(7, states), states)


@pytest.mark.parametrize("score", [np.float32(0.5), np.array(0.5), jnp.float32(0.5), 0.5, 1, np.int64(1), None])
def test_scores_that_are_numbers(tmp_path, score):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {}, score=score)
    assert checkpoints.record(1) == {"score": score}


@pytest.mark.parametrize("score", [float("nan"), np.float32("inf"), "0.5", [0.5], np.zeros(2)])
def test_scores_that_are_none(tmp_path, score):
    with pytest.raises(ValueError, match=r"^score must be a finite number or None, got .*$"):
        Checkpoints(tmp_path).save(1, {}, score=score)
    assert names(tmp_path) == []


def test_what_a_save_refuses(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"^record must not have the key 'score', .*, got 2$"):
            checkpoints.save(1, {}, score=1, record={"score": 2})
        for round_ in (-1, 1.0, "1"):
            with pytest.raises(ValueError, match=f"^round_ must be an integer of at least 0, got {round_!r}$"):
                checkpoints.save(round_, {})
    assert names(tmp_path) == []


def test_what_is_on_a_mesh_is_kept_without_it(tmp_path):
    plain = {"a": {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2)}, "b": {"w": np.ones((3, 5), np.float32)}}
    spread = fmd.spread_clients(plain, fmd.client_mesh(2))
    assert isinstance(spread, fmd.Spread)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, spread)
    for like in (spread, plain, fmd.spread_clients(plain, fmd.client_mesh(1))):
        checkpoints.check(1, like)
        check_same(checkpoints.load(1, like), plain)
    save_tree(tmp_path / "within", {"states": spread})
    check_same(load_tree(tmp_path / "within", {"states": plain}), {"states": plain})


def test_orbax_is_imported_by_who_keeps_clients():
    code = "import sys, fedmd_jax; fedmd_jax.Checkpoints('.'); print([n for n in sys.modules if 'orbax' in n][:9])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


DAMAGES = {
    "missing": lambda file, _: file.unlink(),
    "empty": lambda file, _: file.write_bytes(b""),
    "truncated": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "flipped": lambda file, content: file.write_bytes(
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_or_does_not_matter(tmp_path, damage, caplog):
    save_tree(tmp_path / "good", tree(), record={"r": 1})
    refused = {}
    for file in (file for file in (tmp_path / "good").rglob("*") if file.is_file() and file.stat().st_size):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        bad = tmp_path / "bad" / file.relative_to(tmp_path / "good")
        DAMAGES[damage](bad, bad.read_bytes())
        try:
            check_same(load_tree(tmp_path / "bad", tree()), tree())
            assert read_record(tmp_path / "bad") == {"r": 1}
        except CheckpointError as error:
            refused[file] = str(error)
        shutil.rmtree(tmp_path / "bad")
    assert all(re.fullmatch(f"the checkpoint {tmp_path / 'bad'} is damaged: .*", line) for line in refused.values())
    assert max((tmp_path / "good").rglob("*"), key=lambda file: file.stat().st_size * file.is_file()) in refused
    assert not [record for record in caplog.records if record.name == "absl"]
    assert logging.getLogger("absl").level < logging.CRITICAL


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.zeros(3)}, r"wanted \['w'\] float64 \[3\], got \['w'\] float32 \[3\]"),
        ({"w": np.zeros(4, np.float32)}, r"wanted \['w'\] float32 \[4\], got \['w'\] float32 \[3\]"),
        ({"v": np.zeros(3, np.float32)}, r"wanted \['v'\] float32 \[3\], got \['w'\] float32 \[3\]"),
        ({"w": np.zeros(3, np.float32), "x": np.zeros(1)}, "wanted 2 arrays, got 1"),
        ({}, "wanted 0 arrays, got 1"),
    ],
)
def test_other_clients_are_refused(tmp_path, other, message):
    save_tree(tmp_path / "a", {"w": np.zeros(3, np.float32)})
    for read in (load_tree, check_tree):
        with pytest.raises(CheckpointError, match=f"^the checkpoint .*a is of other clients: {message}$"):
            read(tmp_path / "a", other)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_tree(tmp_path / "a", {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"^the checkpoint .*a is of format 2, wanted 1$"):
        load_tree(tmp_path / "a", {})


def test_what_is_no_checkpoint(tmp_path):
    ocp.save(tmp_path / "orbax", {"w": np.zeros(3)}, custom_metadata={"epoch": 1})
    ocp.save(tmp_path / "ours", {"w": np.zeros(3)}, custom_metadata={"format": 1, "leaves": {}})
    (tmp_path / "empty").mkdir()
    for name, message in {
        "orbax": "the checkpoint .*orbax is damaged: it has no description",
        "ours": "the checkpoint .*ours is damaged: its description is incomplete",
        "empty": "the checkpoint .*empty is damaged: its description cannot be read .*",
        "nothing": "there is no checkpoint .*nothing",
    }.items():
        with pytest.raises(CheckpointError, match=f"^{message}$"):
            read_record(tmp_path / name)


@contextlib.contextmanager
def full_disk(num_bytes):
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 300, 20_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, num_bytes, capfd):
    states = {"w": np.arange(30_000.0)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, states)
        checkpoints.wait()
        with full_disk(num_bytes):
            checkpoints.save(2, states)
            with pytest.raises(OSError, match=r"cannot write the checkpoint .*/run/2: \w+") as raised:
                checkpoints.wait()
            assert "\n" not in str(raised.value)
        checkpoints.wait()  # is told once
        assert names(tmp_path / "run") == ["1"]
        check_same(checkpoints.load(1, states), states)
        checkpoints.save(2, states)  # there is room again
    assert names(tmp_path / "run") == ["1", "2"]
    assert capfd.readouterr().err == ""


class Snapshots:
    """Copies a folder before everything that this process does to files in it: what SIGKILL would leave there."""

    def __init__(self, folder, copies):
        self.folder, self.copies, self.on, self.copying, self.seen = folder, copies, False, False, set()
        sys.addaudithook(self)  # for good, so it can be switched off

    def __call__(self, event, args):
        if not self.on or self.copying or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if not any(isinstance(arg, (str, os.PathLike)) and str(self.folder) in str(arg) for arg in args):
            return
        state = tuple(sorted((str(file), file.lstat().st_size) for file in self.folder.rglob("*") if file.exists()))
        if state in self.seen:
            return
        self.seen.add(state)
        self.copying = True
        with contextlib.suppress(shutil.Error, OSError):  # what another thread removes meanwhile
            shutil.copytree(self.folder, self.copies / str(len(self.seen)))
        self.copying = False


def test_killed_at_any_file_operation_of_a_save(tmp_path):
    states = [{"w": np.full(100, float(round_))} for round_ in range(5)]
    folder, copies = tmp_path / "run", tmp_path / "copies"
    folder.mkdir()
    copies.mkdir()
    snapshots = Snapshots(folder, copies)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, states[1])
        checkpoints.wait()
        snapshots.on = True
        for round_ in (2, 3):
            checkpoints.save(round_, states[round_])
            checkpoints.wait()
        snapshots.on = False
    found = []
    for copy in sorted(copies.iterdir(), key=lambda copy: int(copy.name)):
        with Checkpoints(copy, keep=1) as left:
            found.append(left.latest)
            for round_ in left.rounds:  # nothing that has a name is half there
                check_same(left.load(round_, states[0]), states[round_])
            if len(found) % 3 == 0:
                left.save(4, states[4])
        assert len(found) % 3 or names(copy) == ["4"]
    assert len(found) > 20
    assert found == sorted(found)
    assert set(found) == {1, 2, 3}


@pytest.fixture(scope="module")
def federated():
    """Three clients, two at once, with batch statistics and something random in every step, and data for them."""
    groups = {"normed": fmd.ArchitectureGroup(toys.normed(noise=0.1), (0, 1, 2))}
    federation = toys.federation(groups, clients_per_chunk=2)
    test = fmd.labelled_dataset(*toys.examples(2, 9))
    return federation, toys.public(), toys.private(groups), test


def test_rounds_go_on_to_the_bit(federated, tmp_path, key):
    federation, public, private, test = federated

    def go_on(states, **rounds):
        return fmd.run_federation(federation, states, public, private, key, test=test, **rounds)

    with Checkpoints(tmp_path, keep=3) as checkpoints:
        whole, history = go_on(
            federation.init(key, public, private),
            num_rounds=4,
            callback=lambda metrics, states: checkpoints.save(metrics.round, states),
        )
    assert checkpoints.rounds == [2, 3, 4]
    for done in (2, 3):  # an even one and an odd one
        states, rest = go_on(checkpoints.load(done, whole), num_rounds=4 - done, first_round=done + 1)
        assert rest == history[done + 1 :]
        check_same(states, whole)


def test_the_control_goes_on_to_the_bit(federated, tmp_path, key):
    federation, public, private, _ = federated
    with Checkpoints(tmp_path) as checkpoints:
        states = federation.init(key, public, private)
        whole = fmd.run_local(federation, states, private, key, num_rounds=4, callback=checkpoints.save)
    states = fmd.run_local(federation, checkpoints.load(3, whole), private, key, num_rounds=1, first_round=4)
    check_same(states, whole)


def test_a_population_goes_on_to_the_bit(federated, tmp_path, key):
    federation, public, private, test = federated

    def start():
        return fmd.init_population(federation, key, public, private, cohort_size=2)

    def go_on(population, **rounds):
        return fmd.run_population(federation, population, public, key, cohort_size=2, test=test, **rounds)

    with Checkpoints(tmp_path, keep=3) as checkpoints:
        whole, history = go_on(
            start(), num_rounds=5, callback=lambda metrics, now: checkpoints.save(metrics.round, now.states)
        )
        assert len({tuple(client.client_id for client in metrics.clients) for metrics in history}) > 1
    fresh = start()
    interrupted = fresh._replace(states=checkpoints.load(3, fresh.states))
    population, rest = go_on(interrupted, num_rounds=2, first_round=4)
    assert rest == history[3:]  # the cohorts, too, hang on key and round alone
    check_same(population.states, whole.states)


def test_a_first_round_that_cannot_be(federated, key):
    federation, public, private, test = federated
    states = federation.init(key, public, private)
    with pytest.raises(ValueError, match="first_round must be an integer of at least 1, got 0"):
        fmd.run_federation(federation, states, public, private, key, num_rounds=1, test=test, first_round=0)
    with pytest.raises(ValueError, match="first_round must be an integer of at least 1, got 0"):
        fmd.run_local(federation, states, private, key, num_rounds=1, first_round=0)


def test_a_record_is_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_tree(tmp_path / "a", {}, record={"a": float("nan")})
    assert list(tmp_path.iterdir()) == []
    save_tree(tmp_path / "a", {}, record={"a": (1, 2)})
    assert json.dumps(read_record(tmp_path / "a")) == '{"a": [1, 2]}'
