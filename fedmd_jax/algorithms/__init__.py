"""Algorithms: what one round does, as pure functions. FedMD in `fedmd`, and its siblings, a file for each.

A federation of any of them is `fmd.make_federation(groups, fmd.algorithms.ds_fl(temperature=0.1))`. Most of them send
reports that the server averages: they are a few functions given to `exchange_algorithm`, see `exchange`. FedAvg and its
relatives send parameters, see `fedavg`. If a method differs from FedMD only in the loss, in what a client sends or in
the consensus, it needs no algorithm of its own: pass `distance=`, `transforms=` or `aggregator=` to `fmd.fedmd`.
"""

from fedmd_jax.algorithms.augmentation import (
    Augmentation as Augmentation,
    cut_images as cut_images,
    draw_augmented_subset as draw_augmented_subset,
    warp_images as warp_images,
)
from fedmd_jax.algorithms.base import (
    Algorithm as Algorithm,
    Sizes as Sizes,
    Traffic as Traffic,
    scores_traffic as scores_traffic,
)
from fedmd_jax.algorithms.cfd import cfd as cfd, quantize as quantize
from fedmd_jax.algorithms.class_tables import (
    class_means as class_means,
    revisit_with_table as revisit_with_table,
    send_table as send_table,
    with_private_statistics as with_private_statistics,
)
from fedmd_jax.algorithms.ds_fl import ds_fl as ds_fl, reduce_entropy as reduce_entropy
from fedmd_jax.algorithms.exchange import (
    Mean as Mean,
    Report as Report,
    digest_by as digest_by,
    exchange_algorithm as exchange_algorithm,
    exchange_round as exchange_round,
    fedmd as fedmd,
    probabilities_report as probabilities_report,
    revisit_alone as revisit_alone,
    scores_report as scores_report,
    send_mean as send_mean,
)
from fedmd_jax.algorithms.fd import fd as fd, leave_one_out as leave_one_out
from fedmd_jax.algorithms.fedavg import (
    GroupNetwork as GroupNetwork,
    fedavg as fedavg,
    fedavg_round as fedavg_round,
    parameters_algorithm as parameters_algorithm,
)
from fedmd_jax.algorithms.feddf import feddf as feddf, fuse_groups as fuse_groups
from fedmd_jax.algorithms.fedmd import fedmd_round as fedmd_round
from fedmd_jax.algorithms.fedproto import fedproto as fedproto, prototypes_algorithm as prototypes_algorithm
from fedmd_jax.algorithms.fedprox import fedprox as fedprox
from fedmd_jax.algorithms.fedtgp import fedtgp as fedtgp
from fedmd_jax.algorithms.kt_pfl import kt_pfl as kt_pfl
from fedmd_jax.algorithms.participation import ParticipationPolicy as ParticipationPolicy, all_clients as all_clients
from fedmd_jax.algorithms.public_subset import (
    draw_public_subset as draw_public_subset,
    draw_stratified_subset as draw_stratified_subset,
    first_examples as first_examples,
)
from fedmd_jax.algorithms.scarlet import raise_to_power as raise_to_power, scarlet as scarlet
from fedmd_jax.algorithms.selective_fd import selective_fd as selective_fd
