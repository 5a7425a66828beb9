"""FedMD in Keras 3 with `fit` and `predict`, as in the released code: a peer of `round_time.py`.

One network per client and two compiled models on its layers, one with logits and one with softmax outputs, each with
its own optimizer. Needs `pip install keras tensorflow` (or another Keras 3 backend).
"""

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

PREDICT_BATCH = 256


def cnn(filters: Sequence[int], dropout: float, *, penalty: float, num_classes: int = 16, image: int = 28):
    """The library's `CNN` of two or three convolutions: two models, logits and probabilities, with shared layers."""
    inputs = x = keras.Input((image, image, 1))

    def convolution(x, number, size, stride, padding):
        x = layers.Conv2D(filters[number - 1], size, stride, padding)(x)
        return layers.Dropout(dropout)(layers.ReLU()(layers.BatchNormalization(momentum=0.99, epsilon=1e-3)(x)))

    x = convolution(x, 1, 3, 1, "same")
    x = layers.AveragePooling2D(2, 1, "same")(x)
    if len(filters) == 2:
        x = convolution(x, 2, 3, 2, "valid")
    else:
        x = convolution(x, 2, 2, 2, "valid")
        x = layers.AveragePooling2D(2, 2)(x)
        x = convolution(x, 3, 3, 2, "valid")
    head = layers.Dense(num_classes, use_bias=False, kernel_regularizer=keras.regularizers.L2(penalty))
    scores = head(layers.Flatten()(x))
    return keras.Model(inputs, scores), keras.Model(inputs, layers.Softmax()(scores))


class FedMD:
    """Each method runs one phase for all clients and waits for it: Keras fetches results itself."""

    def __init__(
        self,
        networks: Sequence[tuple[Sequence[int], float]],
        *,
        public: np.ndarray,
        private: Sequence[tuple[np.ndarray, np.ndarray]],
        test: tuple[np.ndarray, np.ndarray],
        digest: tuple[int, int],
        revisit: tuple[int, int],
        penalty: float = 1e-3,
    ):
        """Takes the arguments of `torch_peer.FedMD`; `networks` are pairs of filters and dropout rate."""
        self.public, self.private, self.test = public, private, test
        self.phases = {"digest": digest, "revisit": revisit}
        self.clients = [cnn(filters, dropout, penalty=penalty) for filters, dropout in networks]
        for scorer, classifier in self.clients:
            scorer.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mean_absolute_error")
            classifier.compile(
                optimizer=keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
            )
        self._rng = np.random.default_rng(0)
        self.scores = [self._rng.standard_normal((len(public), 16), np.float32)]
        self.draw()
        self.consensus()

    def draw(self) -> None:
        """Draws the public subset of the round."""
        self.subset = self._rng.permutation(self.public)

    def score(self) -> None:
        """Scores the public subset with every client."""
        self.scores = [scorer.predict(self.subset, PREDICT_BATCH, verbose=0) for scorer, _ in self.clients]

    def consensus(self) -> None:
        """Averages the scores."""
        self.mean_scores = np.mean(self.scores, axis=0)

    def digest(self) -> None:
        """Trains every client towards the consensus."""
        num_epochs, batch_size = self.phases["digest"]
        for scorer, _ in self.clients:
            scorer.fit(self.subset, self.mean_scores, batch_size, num_epochs, verbose=0)

    def revisit(self) -> None:
        """Trains every client on its private data."""
        num_epochs, batch_size = self.phases["revisit"]
        for (_, classifier), (images, labels) in zip(self.clients, self.private, strict=True):
            classifier.fit(images, labels, batch_size, num_epochs, verbose=0)

    def evaluate(self) -> None:
        """Computes accuracy and cross entropy of every client."""
        for _, classifier in self.clients:
            classifier.evaluate(*self.test, PREDICT_BATCH, verbose=0)

    def round(self) -> None:
        """Runs all phases but the evaluation."""
        self.draw()
        self.score()
        self.consensus()
        self.digest()
        self.revisit()
