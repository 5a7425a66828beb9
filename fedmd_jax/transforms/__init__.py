"""What a client does to its scores before it sends them."""

from fedmd_jax.transforms.clipping import Transform, clip_scores

__all__ = [
    "Transform",
    "clip_scores",
]
