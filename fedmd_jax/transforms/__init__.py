"""What a client does to its scores before it sends them.

A new transform is a new file here with a function `transform(scores [M, C], key) -> scores [M, C]` of one client, a
`Transform`; `key` is the client's own in this round, for noise. Settings are keyword arguments, given by `partial`.
It is used by `fedmd(..., transforms=(partial(clip_scores, bound=10.0), ...))`, in this order.
"""

from fedmd_jax.transforms.clipping import Transform as Transform, clip_scores as clip_scores
