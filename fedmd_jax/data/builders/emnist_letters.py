"""The builder of the complete EMNIST Letters."""

import pathlib

import tensorflow_datasets as tfds

from fedmd_jax.data.builders.rows import rows
from fedmd_jax.data.catalogue import CATALOGUE, read_original

_DESCRIPTION = """\
EMNIST Letters: handwritten letters from NIST Special Database 19 in the format of MNIST, 26 classes numbered from 1
with both cases merged, 124,800 and 20,800 images. This builder reads all of them; the stock builder of TensorFlow
Datasets stops after the first 88,800 and 14,800. Images are as NIST ships them, transposed.
"""
_CITATION = """\
@inproceedings{cohen2017emnist,
  title={EMNIST: Extending MNIST to handwritten letters},
  author={Cohen, Gregory and Afshar, Saeed and Tapson, Jonathan and van Schaik, Andr{\\'e}},
  booktitle={International Joint Conference on Neural Networks (IJCNN)},
  pages={2921--2926},
  year={2017},
  doi={10.1109/IJCNN.2017.7966217}
}
"""


class EmnistLetters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Replaces the stock builder of `emnist/letters`, with the same name and version."""

    name = "emnist"
    VERSION = tfds.core.Version("3.1.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="letters", description="EMNIST Letters, whole"),)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=27),  # 0 is not used
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.nist.gov/itl/products-and-services/emnist-dataset",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        data_set = CATALOGUE["emnist/letters"]
        folder = dl_manager.download_and_extract(data_set.url)
        # The archive has been checked.
        original = read_original(data_set, pathlib.Path(folder), checksums=False)
        return {split: self._generate_examples(table) for split, table in original.tables.items()}

    def _generate_examples(self, table):
        return rows(table)
