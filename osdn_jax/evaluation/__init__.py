"""What a trained model is worth."""

from osdn_jax.evaluation.likelihood import LikelihoodSums, likelihood_sums, make_evaluate

__all__ = ["LikelihoodSums", "likelihood_sums", "make_evaluate"]
