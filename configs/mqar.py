"""Multi-query associative recall (MQAR) with small models, for sweeps of rules on a CPU:

    python -m osdn_jax.sweep configs/mqar.py --rules delta_net,osdn,pdn --seeds 5 \\
        --learning_rates 1e-3,3e-3,1e-2 --choose --output runs/mqar

Two layers of width 64 with one head, whose keys have dimension 8, on 64 tokens with 8 pairs: as many as the state holds
without error. A run takes half a minute of one core. benchmarks/results/mqar-once and mqar-twice have the results
of thirteen rules. One model also trains with
`python train.py --config=configs/mqar.py:rule=osdn --workdir=runs/mqar-osdn`, from a fixed set of examples where a
sweep has new ones at every step.
"""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg

# For --rules, next to the rules themselves: "RULE KEY=VALUE …".
VARIANTS = {
    "delta_net_beta2": "delta_net model.negative_eigenvalues=true",
    "delta_net_step": "osdn model.match_step=true",  # the step sizes of osdn without its direction
    "delta_net_pdn_step": "pdn model.match_step=true",
    "pdn_x2": "pdn model.squash=2.0",
    "osdn_paper": "osdn model.preset=paper",
    "osdn_from_2": "osdn model.initial=2.0",  # d_0 above the fixed point of the feedback
    "osdn_trust_0": "osdn model.preset=trust model.beta_aware=true model.anchor=0.0",
    "osdn_trust_1": "osdn model.preset=trust model.beta_aware=true model.anchor=1.0",
    "osdn_fixed_d": "osdn model.eta=0.0 model.initial=1.0 model.forget=false",
    "delta_net_free_keys": "delta_net model.key_norm=false model.fixed_beta=1.0",
    "osdn_free_keys": "osdn model.key_norm=false model.fixed_beta=1.0",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: length=, pairs=, vocabulary=, reads=, power=, random_gaps= of the task.

    width=, heads=, key_dim= (of keys and values), rule=, seed=, steps= of the run.
    """
    given = parse_arg(
        arg,
        length=64,
        pairs=8,
        vocabulary=64,
        reads=1,
        power=0.01,
        random_gaps=True,
        width=64,
        heads=1,
        key_dim=8,
        rule="delta_net",
        seed=0,
        steps=2000,
    )
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps
    config.batch_size = 32
    options = ("length", "pairs", "vocabulary", "power", "random_gaps", "reads")
    config.data.task = "mqar:" + ",".join(f"{name}={given[name]}" for name in options)
    config.data.validation_examples = 512
    config.model.rule = given.rule
    config.model.layers = 2
    config.model.width = given.width
    config.model.heads = given.heads
    config.model.key_dim = config.model.value_dim = given.key_dim
    config.model.mlp_dim = 2 * given.width
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.validation.every = 100
    config.validation.batch_size = 64
    return config
