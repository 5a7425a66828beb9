"""The builder of LEAF's FEMNIST with writers."""

import pathlib

import tensorflow_datasets as tfds

from fedmd_jax.data.builders.rows import rows
from fedmd_jax.data.catalogue import CATALOGUE, read_original
from fedmd_jax.data.originals import LEAF_CLASSES

_DESCRIPTION = """\
FEMNIST of the LEAF benchmark: handwritten digits, capitals and small letters from NIST Special Database 19, each with
the name of its writer. LEAF scales the whole field down, so characters are smaller than EMNIST's. Train and test are
LEAF's own split of each writer's images.
"""
_CITATION = """\
@article{caldas2018leaf,
  title={LEAF: A Benchmark for Federated Settings},
  author={Caldas, Sebastian and Duddu, Sai Meher Karthik and Wu, Peter and Li, Tian and Kone{\\v{c}}n{\\'y}, Jakub and
    McMahan, H. Brendan and Smith, Virginia and Talwalkar, Ameet},
  journal={arXiv preprint arXiv:1812.01097},
  year={2018}
}
"""


class LeafFemnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads the output of LEAF's scripts, or the same data saved as arrays, from the manual folder."""

    name = "leaf"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="femnist", description="FEMNIST with writers"),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "LEAF has no download: run its data/femnist/preprocess.sh -s niid --sf 1.0 -k 0 -t sample (see "
        "https://leaf.cmu.edu) and copy the folders data/train and data/test here."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(names=LEAF_CLASSES),
                    "writer": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://leaf.cmu.edu",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        original = read_original(CATALOGUE["leaf/femnist"], pathlib.Path(dl_manager.manual_dir))
        return {split: self._generate_examples(table) for split, table in original.tables.items()}

    def _generate_examples(self, table):
        return rows(table)
