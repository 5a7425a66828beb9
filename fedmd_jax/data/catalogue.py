"""The data sets that `fedmd-jax data` can prepare, and the files from which it does."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from fedmd_jax.checks import unknown
from fedmd_jax.data import originals
from fedmd_jax.data.files import DataError, open_unzipped, reading, stored
from fedmd_jax.data.originals import Original


class Source(NamedTuple):
    """A set of files from which a data set can be prepared.

    Attributes:
      title: names of the files, for messages.
      folders: possible subfolders of the folder that the user names; that folder itself is tried last.
      checksums: sha256 by name of file, of the unzipped content if it is an idx file, which comes zipped in several
        ways; None for what differs from user to user, and for folders.
      read: function that reads the files, given in this order.
    """

    title: str
    folders: tuple[str, ...]
    checksums: dict[str, str | None]
    read: Callable[[list[pathlib.Path]], Original]


class DataSet(NamedTuple):
    """A data set of the catalogue.

    Attributes:
      name: name as in TensorFlow Datasets.
      title: short description.
      num_classes: number of different labels.
      sizes: number of examples of train and test; None if every user draws a sample.
      terms: terms of use and reference to cite.
      url: URL of the download; None if there is no download.
      sources: sets of files from which it can be prepared.
    """

    name: str
    title: str
    num_classes: int
    sizes: tuple[int, int] | None
    terms: str
    url: str | None
    sources: tuple[Source, ...]


_CIFAR_TERMS = "no explicit licence; cite Krizhevsky 2009"

_MNIST = Source(
    "train-images-idx3-ubyte.gz and the three files beside it",
    ("mnist", "MNIST/raw"),  # the last as in torchvision
    {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    originals.read_idx_files,
)
_EMNIST = Source(
    "emnist-letters-train-images-idx3-ubyte.gz and the three files beside it",
    ("emnist_letters", "emnist/letters", "gzip", "EMNIST/raw"),  # the last two as in NIST's zip file and in torchvision
    {
        "emnist-letters-train-images-idx3-ubyte.gz": "7a786db773b2096a7b9a3f3275388a27711f4451548c3ca8be96f09ae94371ae",
        "emnist-letters-train-labels-idx1-ubyte.gz": "e8e94c3f4353d5532fd9604b939cb4c76e7847945b9b0d9ff7884d881dead6bc",
        "emnist-letters-test-images-idx3-ubyte.gz": "d5895e82d14765b22a84342337bc5c25f1affd61cc97d3821d4e65504bbf8dbc",
        "emnist-letters-test-labels-idx1-ubyte.gz": "22dbcde0a929a7f166bdac863b9195b2994d840a1e082f8f6daaeac5606376a6",
    },
    originals.read_idx_files,
)
_CIFAR10_ARCHIVE = Source(
    "cifar-10-binary.tar.gz",
    ("cifar10",),
    {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    originals.read_cifar10_archive,
)
_CIFAR10_RESIDUALS = Source(
    "cifar10.npz",
    ("cifar10",),
    {"cifar10.npz": "a43751dd8dbc13e94ea164cd43a66f6b1e60efcbe57c570c789b9c356770db07"},
    originals.read_cifar10_residuals,
)
_CIFAR100_ARCHIVE = Source(
    "cifar-100-binary.tar.gz",
    ("cifar100",),
    {"cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
    originals.read_cifar100_archive,
)
_CIFAR100_RESIDUALS = Source(
    "cifar100_fedmd.npz",
    ("cifar100_fedmd", "cifar100"),
    {"cifar100_fedmd.npz": "6a60bed36a45648ce1cba68662fcc8db7592592007d75c38b473623133714da2"},
    originals.read_cifar100_residuals,
)
_LEAF_ARRAYS = Source(
    "femnist_leaf105.npz",
    ("femnist_leaf", "leaf_femnist", "leaf/femnist"),
    {"femnist_leaf105.npz": "25c894867d384ee2829953844a2cf7b51852440288eeff945e6e80c4a40eab70"},
    originals.read_leaf_arrays,
)
# Every user draws a sample of LEAF, so there is no checksum. The folder that `preprocess.sh` fills is named data.
_LEAF_JSON = Source(
    "the folders train and test that LEAF's preprocess.sh fills",
    ("data",),
    {"train": None, "test": None},
    originals.read_leaf_json,
)

CATALOGUE = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            name="mnist",
            title="handwritten digits, 28x28 grey",
            num_classes=10,
            sizes=(60_000, 10_000),
            terms="CC BY-SA 3.0; cite LeCun, Cortes and Burges",
            url="https://storage.googleapis.com/cvdf-datasets/mnist/train-labels-idx1-ubyte.gz",
            sources=(_MNIST,),
        ),
        DataSet(
            name="cifar10",
            title="photographs of things and animals, 32x32 colour",
            num_classes=10,
            sizes=(50_000, 10_000),
            terms=_CIFAR_TERMS,
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sources=(_CIFAR10_ARCHIVE, _CIFAR10_RESIDUALS),
        ),
        DataSet(
            name="cifar100",
            title="photographs of 100 kinds in 20 superclasses, 32x32 colour",
            num_classes=100,
            sizes=(50_000, 10_000),
            terms=_CIFAR_TERMS,
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sources=(_CIFAR100_ARCHIVE, _CIFAR100_RESIDUALS),
        ),
        DataSet(
            name="emnist/letters",
            title="handwritten letters, cases merged, 28x28 grey; whole, unlike the stock builder's",
            num_classes=26,
            sizes=(124_800, 20_800),
            terms="from NIST Special Database 19; cite Cohen et al. 2017",
            url="https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
            sources=(_EMNIST,),
        ),
        DataSet(
            name="leaf/femnist",
            title="handwritten digits and letters with their writers, 28x28 grey; a sample of 805,263 by 3,550",
            num_classes=62,
            sizes=None,
            terms="from NIST Special Database 19; cite Caldas et al. 2018",
            url=None,
            sources=(_LEAF_ARRAYS, _LEAF_JSON),
        ),
    )
}


def find_data_set(name: str) -> DataSet:
    """Returns a data set of the catalogue by name.

    Args:
      name: name of the data set.

    Raises:
      DataError: the name is unknown.

    >>> find_data_set("mnist").sizes
    (60000, 10000)
    """
    if name not in CATALOGUE:
        raise DataError(unknown("data set", name, CATALOGUE))
    return CATALOGUE[name]


def find_files(data_set: DataSet, folder: pathlib.Path) -> tuple[Source, list[pathlib.Path]] | None:
    """The first source of a data set of which at least one file is in a folder.

    Args:
      data_set: the data set.
      folder: the folder.

    Returns:
      The source and the paths of its files, some of which may be missing; None if no source is found.
    """
    for source in data_set.sources:
        for place in (*(folder / name for name in source.folders), folder):
            paths = [stored(place / name) for name in source.checksums]
            if any(path.exists() for path in paths):
                return source, paths
    return None


def wanted(data_set: DataSet) -> str:
    """Names of the files from which a data set can be prepared.

    Args:
      data_set: the data set.

    >>> wanted(find_data_set("cifar10"))
    'cifar-10-binary.tar.gz or cifar10.npz'
    """
    return " or ".join(source.title for source in data_set.sources)


def read_original(data_set: DataSet, folder: pathlib.Path, *, checksums: bool = True) -> Original:
    """Reads a data set from its files.

    Args:
      data_set: the data set.
      folder: folder of the files, or its parent.
      checksums: whether to verify the known checksums.

    Returns:
      The rows of both splits.

    Raises:
      DataError: a file is missing or damaged, or has another checksum.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder} to prepare {data_set.name} from")
    found = find_files(data_set, folder)
    if found is None:
        places = ", ".join(dict.fromkeys(name for source in data_set.sources for name in source.folders))
        raise DataError(f"no files of {data_set.name} in {folder}: wanted {wanted(data_set)}, there or under {places}")
    source, paths = found
    for path, expected in zip(paths, source.checksums.values(), strict=True):
        if not path.exists():
            raise DataError(f"{path} is missing, {data_set.name} is not whole without it")
        if checksums and expected is not None:
            _check_sum(path, expected)
    return source.read(paths)


def _check_sum(path, expected):
    with reading(path), open_unzipped(path) if "idx" in path.name else path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            f"{path}, {path.stat().st_size:,} bytes, is truncated or another file: wanted sha256 {expected}, "
            f"found {found}; get it again, or take it as it is with --no-checksums"
        )
