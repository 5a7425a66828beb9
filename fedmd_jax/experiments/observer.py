"""Who is told how far a run is, and what came out so far."""

from fedmd_jax.experiments.kept import ROUNDS
from fedmd_jax.metrics import RoundMetrics

# What an observer hears of, in this order; the public half may have an addition.
PREPARING = "preparing the networks"
PUBLIC_HALF, PRIVATE_HALF = "transfer learning: public data", "transfer learning: private data"
LOCAL_ONLY, UPPER_BOUND = "local only", "pooled upper bound"
TITLES = (PREPARING, PUBLIC_HALF, PRIVATE_HALF, ROUNDS, LOCAL_ONLY, UPPER_BOUND)


class Observer:
    """What a run tells while it goes on; listens to nothing where a method is not overridden."""

    def phase(self, title: str) -> None:
        """Something begins that may take a while."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is over; round 0 is the end of transfer learning."""

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """The control without digests is known, per client id, and rounds whose training was undone, where any was."""

    def pooled(self, accuracy: dict[int, float]) -> None:
        """The upper bound is known, per client id."""


class Observers(Observer):
    """Several observers as one; they hear in the order given."""

    def __init__(self, *observers: Observer):
        self._observers = observers

    def phase(self, title: str) -> None:
        """To all."""
        for observer in self._observers:
            observer.phase(title)

    def round(self, metrics: RoundMetrics) -> None:
        """To all."""
        for observer in self._observers:
            observer.round(metrics)

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """To all."""
        for observer in self._observers:
            observer.local(accuracy, undone)

    def pooled(self, accuracy: dict[int, float]) -> None:
        """To all."""
        for observer in self._observers:
            observer.pooled(accuracy)
