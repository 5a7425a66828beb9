"""Data files of every format that is read: idx, npz, CIFAR's archives, LEAF's JSON, TensorFlow Datasets' own."""

import gzip
import io
import json
import math
import pathlib
import struct
import tarfile
import tempfile
import zipfile

import numpy as np
from fuzzing import odd
from fuzzing.harness import Target
from hypothesis import strategies as st

from fedmd_jax.data import DataError, load_column, load_images, preparing
from fedmd_jax.data.catalogue import CATALOGUE, read_original
from fedmd_jax.data.files import read_idx
from fedmd_jax.data.sources import records_info

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzing_data_")
FOLDER = pathlib.Path(_FOLDER.name)


def place(*parts):
    path = FOLDER.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# idx

_sizes = st.sampled_from([0, 1, 2, 3, 2**16, 2**31, 2**32 - 1])
idx_files = st.tuples(
    odd.maybe(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(_sizes, min_size=0, max_size=4), 2),
    odd.maybe(st.just(8), st.integers(0, 255)),
    odd.maybe(st.just(0), st.integers(-2, 9) | st.just(300_000)),
    odd.maybe(st.just([]), odd.byte_edits, 2),
    odd.maybe(st.just([]), odd.byte_edits),
    st.sampled_from([1, 3, 3, 3]),
)


def check_idx(case):
    sizes, kind, more, edits, outer_edits, rank = case
    num_bytes = math.prod(sizes) if math.prod(sizes) < 1000 else 10
    raw = bytes([0, 0, kind, len(sizes)]) + b"".join(struct.pack(">I", size) for size in sizes)
    raw = odd.damaged(raw + bytes(i % 251 for i in range(max(0, num_bytes + more))), edits)
    path = place("some.gz")
    path.write_bytes(odd.damaged(gzip.compress(raw, 1), outer_edits))
    array = read_idx(path, rank)
    raw = gzip.decompress(path.read_bytes())
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    assert raw[:4] == bytes([0, 0, 8, rank])
    assert (array.shape, array.tobytes()) == (shape, raw[4 + 4 * rank :])


# npz


@st.composite
def npy_files(draw, usual):
    """An array as a .npy file: a good one, one of a strange array, or one with a header that promises anything."""
    kind = draw(st.sampled_from(["good", "good", "good", "odd", "header", "pickle"]))
    if kind == "header":
        shape = draw(
            st.sampled_from(["(2,)", "(1099511627776,)", "(4294967296, 4294967296)", "(-1,)", "3", "(2, 1, 1, 1)"])
        )
        shape = draw(st.just(shape) | st.just("(" * 150 + ")" * 150))
        descr = draw(
            st.sampled_from(["'|u1'", "'<i8'", "'|O'", "'<U1000000000'", "[('a', '<i4')]", "'|V8'", "__import__"])
        )
        order = draw(st.sampled_from(["False", "True", "2"]))
        header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
        version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
        size = struct.pack(
            "<H" if version == b"\x01\x00" else "<I", len(header) + draw(st.sampled_from([0, 0, 5, 60000]))
        )
        return b"\x93NUMPY" + version + size + header + bytes(draw(st.integers(0, 64)))
    buffer = io.BytesIO()
    if kind == "pickle":
        np.save(buffer, np.array([{"a": 1}, None], object), allow_pickle=True)
        return buffer.getvalue()
    np.save(buffer, usual if kind == "good" else draw(odd.arrays()), allow_pickle=True)
    return odd.damaged(buffer.getvalue(), draw(odd.maybe(st.just([]), odd.byte_edits)))


IMAGES = np.arange(24, dtype=np.uint8).reshape(3, 2, 4, 1)
LABELS, WRITERS = np.array([2, 0, 1]), np.array(["b", "a", "b"])
npz_files = st.tuples(
    st.fixed_dictionaries(
        {"images": npy_files(IMAGES), "labels": npy_files(LABELS), "writer": npy_files(WRITERS)},
    ),
    odd.maybe(st.none(), st.sampled_from(["images", "labels", "writer", "all"]), 8),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    odd.maybe(st.just([]), odd.byte_edits),
)


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED, edits=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    path.write_bytes(odd.damaged(buffer.getvalue(), edits))


def check_npz(case):
    members, missing, compression, edits = case
    members = {name: content for name, content in members.items() if missing not in (name, "all")}
    path = place("own", "train.npz")
    write_zip(path, members, compression, edits)
    images, labels = load_images("own", "train", data_dir=FOLDER)
    writers = load_column("own", "train", "writer", data_dir=FOLDER)
    expected = np.load(path)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    for found, key in ((images, "images"), (labels, "labels"), (writers, "writer")):
        assert len(found) == len(images)
        np.testing.assert_array_equal(found, expected[key])


# CIFAR and LEAF, as their publishers have them or as arrays.


def cifar_bytes(num_kinds, num_rows, more):
    rows = np.arange(num_rows * (num_kinds + 3072)) % 7
    return rows.astype(np.uint8).tobytes() + bytes(more)


@st.composite
def cifar_archives(draw):
    """CIFAR-10 or -100: its members, how the archive is packed, and what befalls it."""
    name = draw(st.sampled_from(["cifar10", "cifar100"]))
    rows = odd.maybe(st.just((2, 0)), st.tuples(st.integers(0, 3), st.integers(-1, 1) | st.just(0)))
    members = {}
    if name == "cifar10":
        folder, kinds = "cifar-10-batches-bin", 1
        files = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        texts = {"batches.meta.txt": 10}
    else:
        folder, kinds = "cifar-100-binary", 2
        files, texts = ["train.bin", "test.bin"], {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
    for file in files:
        num_rows, more = draw(rows)
        members[f"{folder}/{file}"] = cifar_bytes(kinds, num_rows, max(more, 0))[: None if more >= 0 else -1]
    for file, count in texts.items():
        names = "\n".join(f"name{i}" for i in range(count)).encode()
        members[f"{folder}/{file}"] = odd.damaged(names, draw(odd.maybe(st.just([]), odd.byte_edits)))
    strange = draw(odd.maybe(st.none(), st.tuples(st.sampled_from(sorted(members)), st.sampled_from("lds2x")), 3))
    return (
        name,
        members,
        strange,
        draw(st.sampled_from(["gz", "gz", "", "xz"])),
        draw(odd.maybe(st.just([]), odd.byte_edits)),
    )


def write_tar(path, members, strange, packing, edits):
    """`strange` is a member that is a link, a folder, missing, or says that it has 2**40 bytes."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode=f"w:{packing}", **({"compresslevel": 1} if packing == "gz" else {})
    ) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if strange and strange[0] == name:
                if strange[1] == "x":
                    continue
                info.type = {"l": tarfile.LNKTYPE, "d": tarfile.DIRTYPE, "s": tarfile.SYMTYPE, "2": tarfile.REGTYPE}[
                    strange[1]
                ]
                info.linkname = "/etc/passwd"
                info.size = 0
                if strange[1] == "2":
                    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40), "GNU.sparse.name": name}
                content = b""
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(odd.damaged(buffer.getvalue(), edits))


def read_all(name, folder):
    """What preparing a data set does before it writes."""
    original = read_original(CATALOGUE[name], folder, checksums=False)
    return {split: preparing._arrays(name, table, name) for split, table in original.tables.items()}


def check_cifar(case):
    name, members, *how = case
    folder = place("archives", "x").parent
    for old in folder.iterdir():
        old.unlink()
    file = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
    write_tar(folder / file, members, *how)
    arrays = read_all(name, folder)
    kinds = 1 if name == "cifar10" else 2
    content = {
        key: b"".join(v for k, v in members.items() if key in k and k.endswith(".bin")) for key in ("train", "test")
    }
    content["train"] = content["train"] or b"".join(v for k, v in members.items() if "data_batch" in k)
    for split, columns in arrays.items():
        row = 3072 + kinds
        expected = np.frombuffer(content[split], np.uint8).reshape(-1, row)
        if not how[-1]:
            assert columns["labels"].tolist() == expected[:, kinds - 1].tolist()
            assert columns["images"][0, 1, 2].tolist() == [expected[0, kinds + 1024 * c + 34] for c in range(3)]


RESIDUAL = np.arange(3 * 2 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2, 2)
_ARRAYS = {
    "cifar10": {
        **{f"{split}_residual": RESIDUAL for split in ("train", "test")},
        **{f"{split}_labels": np.array([1, 0]) for split in ("train", "test")},
        "label_names": np.array([f"n{i}" for i in range(10)]),
    },
    "cifar100": {
        **{f"{split}_residual": RESIDUAL for split in ("train", "test")},
        **{
            f"{split}_{what}": np.array([1, 0])
            for split in ("train", "test")
            for what in ("fine_labels", "coarse_labels")
        },
        **{f"{split}_index": np.array([7, 3]) for split in ("train", "test")},
        "fine_label_names": np.array([f"n{i}" for i in range(100)]),
        "coarse_label_names": np.array([f"n{i}" for i in range(20)]),
    },
    "leaf/femnist": {
        "images": np.arange(4 * 784).astype(np.uint8).reshape(4, 28, 28),
        "labels": np.array([0, 10, 61, 36]),
        "writer": np.array([1, 0, 1, 1]),
        "writer_names": np.array(["ann", "bob"]),
        "leaf_test": np.array([False, True, False, True]),
    },
}
_ARRAY_FILES = {"cifar10": "cifar10.npz", "cifar100": "cifar100_fedmd.npz", "leaf/femnist": "femnist_leaf105.npz"}


@st.composite
def array_originals(draw):
    """Arrays that stand for an original, some of them strange or missing."""
    name = draw(st.sampled_from(sorted(_ARRAYS)))
    keys = sorted(_ARRAYS[name])
    chosen = draw(st.lists(st.sampled_from(keys), max_size=2, unique=True))
    replaced = {key: draw(odd.maybe(npy_files(_ARRAYS[name][key]), st.none())) for key in chosen}
    if draw(st.integers(0, 3)) == 0:  # the right shape and the wrong dtype or values
        key = draw(st.sampled_from(keys))
        buffer = io.BytesIO()
        shape = _ARRAYS[name][key].shape
        np.save(buffer, draw(odd.contents(shape, draw(st.sampled_from(odd.DTYPES)))), allow_pickle=True)
        replaced[key] = buffer.getvalue()
    return name, replaced


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def check_array_originals(case):
    name, replaced = case
    folder = place("arrays", "x").parent
    for old in folder.iterdir():
        old.unlink()
    members = {key: npy(array) for key, array in _ARRAYS[name].items()} | replaced
    write_zip(folder / _ARRAY_FILES[name], {key: content for key, content in members.items() if content is not None})
    arrays = read_all(name, folder)
    held = {key: np.load(io.BytesIO(content)) for key, content in members.items() if content is not None}
    if name == "leaf/femnist":
        test = held["leaf_test"]
        for split, rows in (("train", np.flatnonzero(test == 0)), ("test", np.flatnonzero(test != 0))):
            np.testing.assert_array_equal(arrays[split]["labels"], held["labels"][rows])
            writers = [held["writer_names"][i] for i in held["writer"][rows]]
            assert arrays[split]["writer"].tolist() == writers
            assert min(held["writer"]) >= 0
    else:
        label = "train_labels" if name == "cifar10" else "train_fine_labels"
        np.testing.assert_array_equal(arrays["train"]["labels"], held[label])
        assert arrays["train"]["images"][0, 0, 0, 1] == held["train_residual"][1, 0, 0, 0]


def leaf_content(writers=("ann", "bob")):
    x = [[0.0] * 783 + [1.0], [0.5] * 784]
    return {
        "users": list(writers),
        "num_samples": [2] * len(writers),
        "user_data": {w: {"x": [x[0], x[1]], "y": [3, 61]} for w in writers},
    }


@st.composite
def leaf_files(draw):
    """JSON of LEAF with edits; pixels are so many that they have an edit of their own."""
    pixel = draw(
        odd.maybe(st.none(), st.sampled_from([-0.1, 1.1, 300, float("nan"), float("inf"), True, "0.5", None, [0.5]]), 2)
    )
    return draw(odd.json_edits), pixel, draw(odd.maybe(st.just([]), odd.byte_edits))


def check_leaf_json(case):
    edits, pixel, bytes_edits = case
    content = leaf_content()
    for writer in content["user_data"].values():  # the edits are for what is not one of many pixels
        writer["x"] = "pixels"
    content = odd.edited(content, edits)
    x = leaf_content()["user_data"]["ann"]["x"]
    if pixel is not None:
        x[1][5] = pixel
    text = odd.to_text(content).replace('"pixels"', odd.to_text(x))
    folder = place("leaf", "train", "a.json").parent.parent
    place("leaf", "test", "a.json").write_text(json.dumps(leaf_content()))
    place("leaf", "train", "a.json").write_bytes(odd.damaged(text.encode("utf-8", "surrogatepass"), bytes_edits))
    arrays = read_all("leaf/femnist", folder)
    if not bytes_edits and not edits:
        value = leaf_content()["user_data"]["ann"]["x"][1][5] if pixel is None else pixel
        assert 0 <= value <= 1
        assert arrays["train"]["labels"].tolist() == [3, 61, 3, 61]
        assert arrays["train"]["images"][0, 27, 27, 0] == 0
        assert arrays["train"]["images"][1, 0, 5, 0] == 255 - round(255 * value)


INFO = {
    "fileFormat": "array_record",
    "splits": [{"name": "train", "shardLengths": ["60"]}, {"name": "test", "shardLengths": ["7", "3"]}],
}


def check_records_info(case):
    edits, bytes_edits = case
    path = place("some", "3.0.1", "dataset_info.json")
    text = odd.to_text(odd.edited(INFO, edits))
    path.write_bytes(odd.damaged(text.encode("utf-8", "surrogatepass"), bytes_edits))
    form, sizes = records_info(path.parent)
    assert isinstance(form, str)
    assert all(isinstance(name, str) and isinstance(size, int) and size >= 0 for name, size in sizes.items())
    if not bytes_edits and not edits:
        assert sizes == {"train": 60, "test": 10}


TARGETS = [
    Target(name="idx files", case=idx_files, check=check_idx, errors=(DataError,), few=20, share=2),
    Target(name="npz files", case=npz_files, check=check_npz, errors=(DataError,), few=30, share=3),
    Target(name="CIFAR archives", case=cifar_archives(), check=check_cifar, errors=(DataError,), few=10, share=1),
    Target(
        name="arrays of originals",
        case=array_originals(),
        check=check_array_originals,
        errors=(DataError,),
        few=20,
        share=2,
    ),
    Target(name="LEAF's JSON", case=leaf_files(), check=check_leaf_json, errors=(DataError,), few=15, share=1.5),
    Target(
        name="dataset_info.json",
        case=st.tuples(odd.json_edits, odd.maybe(st.just([]), odd.byte_edits)),
        check=check_records_info,
        errors=(DataError,),
        few=10,
        share=1,
    ),
]
