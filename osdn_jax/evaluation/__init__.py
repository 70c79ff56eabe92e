"""What a trained model is worth."""

from osdn_jax.evaluation.likelihood import make_evaluate, weighted_nats

__all__ = ["make_evaluate", "weighted_nats"]
