import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, strategies as st

import fedmd_jax as fmd
from fedmd_jax.experiments.checkpoint import CheckpointError, Checkpoints, PretrainedCache, fingerprint
from fedmd_jax.experiments.run_directory import WriteError
from fedmd_jax.types import ClientState

STATES = {
    "2conv:n1=8,n2=16": ClientState(
        {"w": jnp.array([[0.1, -0.0], [jnp.nan, 1e-40]]), "b": jnp.arange(2, dtype=jnp.bfloat16)},
        {"count": jnp.array([3, 4], jnp.int32)},
        (),
        jnp.array([True, False]),
    ),
    "mlp": ClientState({"w": jnp.ones((1, 3))}, {}, {}, {}),
}


def same(found, wanted):
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in leaves)


def test_states_come_back_to_the_bit_and_the_last_two_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest is None
    for round_, accuracy in enumerate([0.5, 0.8, 0.7, 0.6, 0.6]):
        checkpoints.save(round_, {"fedmd": STATES}, {"round": round_}, accuracy=accuracy)
        checkpoints.wait()
    checkpoints.close()
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == [1, 3, 4]
    checkpoints, records = Checkpoints(tmp_path), []
    found, record = checkpoints.load({"fedmd": STATES}, records.append)
    assert (checkpoints.latest, record, records) == (4, {"round": 4}, [{"round": 4}])
    assert same(found["fedmd"], STATES)
    assert isinstance(found["fedmd"]["mlp"], ClientState)
    checkpoints.close()


def test_states_of_a_mesh_are_the_same_on_disk(tmp_path):
    cache = PretrainedCache(tmp_path, {"mlp": "place"}, {"mlp": STATES["mlp"]})
    spread = fmd.mapping.shard_clients({"mlp": STATES["mlp"]}, fmd.client_mesh(2))
    cache.save("mlp", spread["mlp"], {"failed": [[1]]})
    states, record = cache.load("mlp")
    assert states.params["w"].tolist() == [[1.0] * 3]
    assert (cache.found(), record) == (["mlp"], {"failed": [[1]]})


def test_other_clients_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"fedmd": STATES}, {}, accuracy=0.5)
    checkpoints.wait()
    wider = {**STATES, "mlp": ClientState({"w": jnp.ones((2, 3))}, {}, {}, {})}
    for wanted in ({"fedmd": wider}, {"local": STATES}, {"fedmd": STATES, "local": STATES}):
        with pytest.raises(CheckpointError, match=r"^the checkpoint .*/0 is damaged or of other clients .*remove it"):
            checkpoints.load(wanted, lambda record: None)
    checkpoints.close()


def test_changed_numbers_are_refused(tmp_path):
    """Orbax reads them without complaint."""
    cache = PretrainedCache(tmp_path, {"mlp": "place"}, {"mlp": STATES["mlp"]})
    cache.save("mlp", STATES["mlp"], {})
    base = {"driver": "ocdbt", "base": f"file://{cache.path('mlp')}/state/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": {**base, "path": "mlp.float32"}}, open=True).result()
    store[1] = 2.0
    with pytest.raises(CheckpointError, match=r"place is damaged: its checksum differs; remove it"):
        cache.load("mlp")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks where it fails
def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"^cannot write the checkpoint .*/file/place: .+$"):
        PretrainedCache(tmp_path / "file", {"mlp": "place"}, STATES).save("mlp", STATES["mlp"], {})
    gc.collect()


def test_of_two_runs_that_keep_the_same_clients_the_second_is_content(tmp_path):
    cache = PretrainedCache(tmp_path, {"mlp": "place"}, {"mlp": STATES["mlp"]})
    for _ in range(2):
        cache.save("mlp", STATES["mlp"], {})
    assert cache.found() == ["mlp"]


@given(st.integers(0, 3), st.integers(0, 31))
def test_the_fingerprint_sees_every_bit(position, bit):
    data = np.arange(4, dtype=np.float32)
    other = data.copy()
    other.view(np.uint32)[position] ^= 1 << bit
    assert fingerprint({"a": 1}, [data]) != fingerprint({"a": 1}, [other])


def test_the_fingerprint_sees_shapes_and_kinds():
    data = [np.arange(4.0), np.arange(3)]
    prints = [
        fingerprint({"a": 1}, data),
        fingerprint({"a": 2}, data),
        fingerprint({"a": 1}, [data[0].reshape(2, 2), data[1]]),
        fingerprint({"a": 1}, [data[0], data[1].astype(np.int32)]),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": 1}, data) == prints[0]
