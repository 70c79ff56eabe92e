"""What a trained model is worth."""

from osdn_jax.evaluation.compressors import compressed_bits_per_byte
from osdn_jax.evaluation.likelihood import LikelihoodSums, likelihood_sums, make_evaluate

__all__ = ["LikelihoodSums", "compressed_bits_per_byte", "likelihood_sums", "make_evaluate"]
