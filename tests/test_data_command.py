"""`fedmd-jax data`: what it says, and how it refuses. What it prepares is tested in data/test_preparing.py."""

import gzip
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from fedmd_jax.cli import main
from fedmd_jax.data import load_images, save_images
from fedmd_jax.data.catalogue import CATALOGUE

WHOLE_LETTERS = {"train": 124_800, "test": 20_800}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    for variable in ("FEDMD_JAX_DATA", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def mnist_files(tmp_path):
    """Three images and two, in the format of the originals."""
    folder = tmp_path / "source" / "mnist"
    folder.mkdir(parents=True)
    for stem, size in (("train", 3), ("t10k", 2)):
        for kind, shape in (("images-idx3", (size, 28, 28)), ("labels-idx1", (size,))):
            header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + bytes(np.prod(shape))))
    return folder.parent


def refusal(capsys, *argv):
    assert main(["data", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fedmd-jax: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("fedmd-jax: error: ").strip()


def found(capsys, folder):
    """What `data list` says of each data set."""
    assert main(["data", "list", "--data-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data folder: {folder} (data_dir)"
    column = lines[2].index("found")
    return {line.split()[0]: line[column:] for line in lines[3::2]}


def test_the_help(capsys):
    for argv, words in ((["--help"], "{list,prepare}"), (["list", "-h"], "--data-dir"), (["prepare", "-h"], "--from")):
        assert main(["data", *argv]) == 0
        assert words in capsys.readouterr().out


def test_the_list_has_everything_and_its_terms(capsys):
    assert main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    for data_set in CATALOGUE.values():
        for part in (data_set.name, data_set.title, data_set.terms, *(f"{size:,}" for size in data_set.sizes or ())):
            assert part in printed
    assert "embedded/letters" in printed


def test_the_list_says_in_which_form_data_is_there(capsys, tmp_path, mnist_files):
    assert set(found(capsys, tmp_path / "empty").values()) == {"in the package", "no"}
    save_images(mnist_files, "cifar10", "train", np.zeros((1, 1, 1, 3), np.uint8), np.array([0]))
    (mnist_files / "femnist_leaf105.npz").touch()
    version = mnist_files / "emnist" / "letters" / "3.1.0"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("damaged")
    forms = found(capsys, mnist_files)
    assert forms["mnist"] == "original files, mnist"
    assert forms["cifar10"] == "plain arrays, cifar10/train.npz"
    assert forms["leaf/femnist"] == "not prepared, but femnist_leaf105.npz is there for prepare --from"
    assert forms["emnist/letters"] == f"damaged, {version}"
    assert forms["cifar100"] == "no"
    info = {"fileFormat": "tfrecord", "splits": [{"name": "test", "shardLengths": ["2", "1000"]}]}
    (version / "dataset_info.json").write_text(json.dumps(info))
    assert found(capsys, mnist_files)["emnist/letters"] == "prepared as tfrecord, which is not read, 3.1.0"
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    assert found(capsys, mnist_files)["emnist/letters"] == (
        "prepared, 3.1.0, 1,002 test (a part: the whole has 124,800 and 20,800), records only, slow to read"
    )
    info["splits"] = [{"name": split, "shardLengths": [str(size)]} for split, size in WHOLE_LETTERS.items()]
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    expected = "prepared, 3.1.0, 124,800 train, 20,800 test, records only, slow to read"
    assert found(capsys, mnist_files)["emnist/letters"] == expected


def test_prepare_says_what_it_did(capsys, tmp_path, mnist_files):
    argv = ["data", "prepare", "mnist", f"--from={mnist_files}", "--data-dir", str(tmp_path / "data"), "--no-checksums"]
    path = tmp_path / "data" / "mnist" / "3.0.1"
    assert main(argv) == 0
    sizes = "3 train, 2 test (a part: the whole has 60,000 and 10,000)"
    assert capsys.readouterr() == (f"preparing mnist ...\nmnist prepared in {path}: {sizes}\n", "")
    assert len(load_images("mnist", "test", data_dir=tmp_path / "data").labels) == 2
    assert found(capsys, tmp_path / "data")["mnist"] == f"prepared, 3.0.1, {sizes}"
    assert main(argv) == 0
    assert f"mnist there already, nothing is changed (delete it to prepare it again): {path}" in capsys.readouterr().out


def test_a_wrong_file_is_refused_in_one_line(capsys, tmp_path, mnist_files):
    message = refusal(capsys, "prepare", "mnist", "--from", str(mnist_files), "--data-dir", str(tmp_path / "data"))
    assert message.startswith(f"{mnist_files / 'mnist' / 'train-images-idx3-ubyte.gz'}, ")
    assert "wanted sha256 ba891046e650" in message
    assert message.endswith("get it again, or take it as it is with --no-checksums")


def test_a_folder_that_cannot_be_written_is_a_failure_of_one_line(capsys, tmp_path, mnist_files):
    (tmp_path / "file").touch()
    argv = [
        "prepare",
        "mnist",
        "--from",
        str(mnist_files),
        "--data-dir",
        str(tmp_path / "file" / "x"),
        "--no-checksums",
    ]
    assert main(["data", *argv]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fedmd-jax: error: cannot write the data set: ")
    assert message.count("\n") == 1


def test_ctrl_c_leaves_nothing(capsys, tmp_path, mnist_files, monkeypatch):
    def interrupt(path, **arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmd_jax.data.preparing.write_npz", interrupt)
    argv = ["prepare", "mnist", "--from", str(mnist_files), "--data-dir", str(tmp_path / "data"), "--no-checksums"]
    assert main(["data", *argv]) == 130
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["lsit"],
        ["list", "--from", "x"],
        ["list", "--data-dir"],
        ["prepare", "mnist", "--from", "--data-dir", "x"],
        ["prepare", "mnist", "--form", "x"],
        ["prepare", "mnist", "--no-checksums=yes"],
        ["prepare"],
        ["prepare", "mnist", "x"],
    ],
)
def test_what_makes_no_sense_is_refused(argv, capsys):
    assert main(["data", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, bool(err)) == ("", True)


def test_an_unknown_data_set_is_refused(capsys):
    assert refusal(capsys, "prepare", "mnits") == "unknown data set 'mnits', perhaps you meant mnist"


def test_the_list_of_one_data_set_names_its_files(capsys):
    for name, data_set in CATALOGUE.items():
        assert main(["data", "list", name]) == 0
        printed = capsys.readouterr().out
        for source in data_set.sources:
            assert all(f"  {file}\n" in printed for file in source.checksums)
            assert " or ".join(source.folders) in printed
        assert (data_set.url or "has no download") in printed


def test_a_run_takes_folders_of_images_by_class(tmp_path, capsys):
    for split, num_per_class in (("train", 9), ("test", 5)):
        images, labels = load_images("embedded/letters", split)
        for label in range(3):
            folder = tmp_path / "scans" / split / "xyz"[label]
            folder.mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:num_per_class]):
                Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    argv = shlex.split(
        "run quickstart --smoke --networks mlp mlp --data.num-public 20 --subset-size 10 --data.private-classes 0 2 "
        "--data.num-test 10 --progress none --no-pooled"
    )
    folders = ["--data.public", str(tmp_path / "scans" / "train"), "--data.private", str(tmp_path / "scans")]
    assert main([*argv, *folders, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_clients"] == 2
    capsys.readouterr()
    (tmp_path / "scans" / "test").rename(tmp_path / "scans" / "dev")
    assert main([*argv, *folders, "--out", str(tmp_path / "other")]) == 2
    expected = f"fedmd-jax: error: {tmp_path / 'scans'}: wanted a folder of images by class, test/CLASS/*.png, found no"
    assert capsys.readouterr().err.startswith(expected)
