"""Training runs small enough for a test."""

import numpy as np

from osdn_jax.training import default_config

WORDS = "the memory writes what key and value recall under decay while queries read it back again".split()


def write_text(path, words=900, seed=0):
    """A .txt file of random words in lines of twelve, the same for the same arguments."""
    drawn = np.random.default_rng(seed).choice(WORDS, words)
    path.write_text("".join(f"{' '.join(drawn[i : i + 12])}.\n" for i in range(0, words, 12)))
    return path


def tiny_config(data, **changes):
    """Forty steps of a model of one layer on the text at `data`; changes by dotted key, "." written as "__"."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "steps": 40,
            "batch_size": 2,
            "sequence_length": 24,
            "data.path": str(data),
            "model.layers": 1,
            "model.width": 16,
            "model.mlp_dim": 16,
            "optimizer.learning_rate": 1e-2,
            "optimizer.warmup_steps": 4,
            "validation.every": 20,
            "validation.windows": 3,
            "validation.batch_size": 2,
            "validation.sequence_length": 48,
            "checkpoint.every": 10,
            "checkpoint.keep": 2,
            "log_every": 1,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config
