"""The files of a checkpoint, and the notes in it: as they were written, or a complaint."""

import json
import pathlib
import shutil
import tempfile

import numpy as np
from fuzzing import odd
from fuzzing.harness import Target
from hypothesis import strategies as st

from fedmd_jax import CheckpointError, Checkpoints, load_tree, save_tree
from fedmd_jax.checkpoint import _digest, _read_bytes, read_record
from fedmd_jax.experiments.kept import ROUNDS, OnDisk

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzing_checkpoints_")
FOLDER = pathlib.Path(_FOLDER.name)
TREE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(4), "none": np.zeros((0, 2), np.int8)}
RUN = {"settings": {"seed": 0}, "versions": {"jax": "1"}}
RECORD = {
    "run": RUN,
    "phase": "rounds",
    "position": {"num_bytes": 7, "seconds": {"total": 1.5}},
    "note": {"undone": []},
}
DESCRIPTION = "_CHECKPOINT_METADATA"


def good():
    """The checkpoint of round 3, written once."""
    path = FOLDER / "good" / "3"
    if not path.exists():
        save_tree(path, TREE, record={"score": 0.5, **RECORD})
    return path


def copied(name):
    path = FOLDER / name / "3"
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(good(), path)
    return path


def files_of(path):
    return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p.name))


damages = st.lists(
    st.tuples(
        st.sampled_from(["bytes", "bytes", "bytes", "json", "swap", "remove", "folder", "other", "link"]),
        st.integers(0, 20),
        st.integers(0, 20),
        odd.byte_edits,
        odd.json_edits,
    ),
    max_size=3,
)


def spoil(path, damage):
    kind, which, other, byte_edits, json_edits = damage
    files = files_of(path)
    if not files:
        return
    file, other = files[which % len(files)], files[other % len(files)]
    content = file.read_bytes()
    if kind == "bytes":
        file.write_bytes(odd.damaged(content, byte_edits))
    elif kind == "json":
        file = path / DESCRIPTION if which % 2 else path / "state" / "_METADATA"
        try:
            text = odd.to_text(odd.edited(json.loads(file.read_bytes()), json_edits))
        except (OSError, ValueError, RecursionError):
            return
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "other":
        file.write_bytes(other.read_bytes())
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "link":
            file.symlink_to(file.name)


def same(tree):
    return all(np.array_equal(tree[k], TREE[k]) and tree[k].dtype == TREE[k].dtype for k in TREE)


def check_files(case):
    path = copied("bad")
    for damage in case:
        spoil(path, damage)
    checkpoints = Checkpoints(path.parent)
    assert checkpoints.rounds in ([], [3])
    assert same(load_tree(path, TREE))
    assert read_record(path) == {"score": 0.5, **RECORD}


def resigned(path, edits):
    """Its notes are others, and the digest is right: nobody's accident."""
    file = path / DESCRIPTION
    content = json.loads(file.read_bytes())
    note = content["custom_metadata"]
    changed = odd.edited({key: note[key] for key in ("format", "leaves", "record")}, edits)
    changed = json.loads(odd.to_text(changed))
    if not isinstance(changed, dict):
        content["custom_metadata"] = changed
    else:
        note.update(changed)
        note["digest"] = _digest(note, _read_bytes(good()))
        content["custom_metadata"] = note
    file.write_text(json.dumps(content))


def check_notes(case):
    edits, reads = case
    path = copied(f"signed/{ROUNDS}" if reads == "run" else "signed")
    try:
        resigned(path, edits)
    except (ValueError, RecursionError):  # nobody can write that, either
        resigned(path, [])
    if reads == "tree":
        assert same(load_tree(path, TREE))
    elif reads == "best":
        with Checkpoints(path.parent, keep=1) as checkpoints:
            checkpoints.save(4, TREE, score=0.25)
            checkpoints.save(5, TREE)
            checkpoints.wait()
            assert {4, 5} - set(checkpoints.rounds) <= {4}
    else:
        folder = FOLDER / "signed"
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / ROUNDS).rename(folder / "checkpoints" / ROUNDS)
        kept = OnDisk(folder, RUN, every=1, num_rounds=5, position=dict)
        position = kept.check(TREE)
        if position is not None:
            assert position["num_bytes"] >= 0
            assert all(isinstance(value, (int, float)) for value in position["seconds"].values())


def check_trees(case):
    path = FOLDER / "tree"
    save_tree(path, case)
    found = load_tree(path, case)
    for name, leaf in case.items():
        if leaf is None or isinstance(leaf, (tuple, dict)):  # trees without leaves
            assert found[name] == leaf
            continue
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape)


TARGETS = [
    Target(name="files of a checkpoint", case=damages, check=check_files, errors=(CheckpointError,), few=6, share=1),
    Target(
        name="notes of a checkpoint",
        case=st.tuples(odd.json_edits, st.sampled_from(["tree", "tree", "run", "run", "run", "best"])),
        check=check_notes,
        errors=(CheckpointError,),
        few=3,
        share=0.5,
    ),
    Target(
        name="trees for a checkpoint",
        case=st.dictionaries(
            st.sampled_from(["a", "b", "é\n", ""]), odd.arrays() | odd.maybe(odd.arrays(), odd.things, 3), max_size=2
        ),
        check=check_trees,
        few=3,
        share=0.2,
    ),
]
