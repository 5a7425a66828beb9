"""Many clients on your devices: federations, populations, participation, metrics."""

from fedmd_jax.simulation.cohorts import (
    Cohort as Cohort,
    cohort_sizes as cohort_sizes,
    draw_cohort as draw_cohort,
    get_rows as get_rows,
    set_rows as set_rows,
)
from fedmd_jax.simulation.communication import (
    CommunicationCost as CommunicationCost,
    communication_bytes as communication_bytes,
)
from fedmd_jax.simulation.federation import (
    Federation as Federation,
    cosine_decay as cosine_decay,
    fedmd as fedmd,
    make_federation as make_federation,
    run_federation as run_federation,
    run_local_only as run_local_only,
    vmap_federation as vmap_federation,
)
from fedmd_jax.simulation.federation_data import labelled_dataset as labelled_dataset, public_dataset as public_dataset
from fedmd_jax.simulation.metrics import (
    ClientMetrics as ClientMetrics,
    History as History,
    RoundMetrics as RoundMetrics,
    round_metrics as round_metrics,
)
from fedmd_jax.simulation.participation import (
    draw_participation as draw_participation,
    simulate_participation as simulate_participation,
)
from fedmd_jax.simulation.population import (
    Population as Population,
    evaluate_population as evaluate_population,
    init_population as init_population,
    population_round as population_round,
    run_population as run_population,
    transfer_learn_population as transfer_learn_population,
)
from fedmd_jax.simulation.trained import (
    Ensemble as Ensemble,
    Preprocessing as Preprocessing,
    TrainedClient as TrainedClient,
    mean_logits as mean_logits,
    mean_probabilities as mean_probabilities,
    trained_clients as trained_clients,
)
