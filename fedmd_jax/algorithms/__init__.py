"""Rounds of federated algorithms as pure functions: a file for each algorithm, and what their rounds share.

A sibling of FedMD is a new file here with one function, `name_round(states, public, private, key, *, groups, ...) ->
(states, RoundInfo)`, of the form of `fedmd.fedmd_round`: it maps functions of one client (from `client/`) with
`map_groups`, aggregates their reports with an aggregator, and takes `participants`. `simulation.fedmd` makes the
compiled program of the round: a sibling needs a function like it, which replaces the program "round". If a method
differs from FedMD only in the loss, in what a client sends or in the consensus, it needs no file: pass `distance=`,
`transforms=` (see `transforms`) or `aggregator=` (see `aggregators`) to `fedmd`.
"""

from fedmd_jax.algorithms.fedmd import fedmd_round as fedmd_round
from fedmd_jax.algorithms.participation import ParticipationPolicy as ParticipationPolicy, all_clients as all_clients
from fedmd_jax.algorithms.public_subset import (
    draw_public_subset as draw_public_subset,
    draw_stratified_subset as draw_stratified_subset,
    first_examples as first_examples,
)
