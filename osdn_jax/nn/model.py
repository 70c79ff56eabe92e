"""The causal language model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from osdn_jax.nn import initializers
from osdn_jax.nn.config import ModelConfig
from osdn_jax.nn.layers import RMSNorm, SwiGLU, dropout, linear
from osdn_jax.nn.mixer import DeltaMixer, MixerState


class Block(nnx.Module):
    """A pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """config: of the whole model."""
        width, dtype = config.mixer.width, jnp.dtype(config.dtype)
        self.dropout = config.dropout
        self.mixer_norm = RMSNorm(width, config.norm_epsilon, rngs=rngs)
        self.mixer = DeltaMixer(config.mixer, config.layers, dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(width, config.norm_epsilon, rngs=rngs)
        self.mlp = SwiGLU(width, config.mlp_dim, config.layers, dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MixerState | None,
        segment_ids: Int[Array, "B T"] | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], MixerState]:
        """Returns the residual stream after the block and the mixer's state after the last token."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        mixed, state = self.mixer(self.mixer_norm(x), state, segment_ids)
        x = x + dropout(mixed, self.dropout, keys[0])
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, keys[1]), state


class CausalLM(nnx.Module):
    """A causal language model over tokens; positions come from the recurrence alone."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """config: sizes and rule; rngs: its `params` stream starts the parameters."""
        self.config = config
        width, dtype = config.mixer.width, jnp.dtype(config.dtype)
        self.embedding = nnx.Embed(
            config.vocab_size, width, dtype=dtype, embedding_init=initializers.embedding, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(width, config.norm_epsilon, rngs=rngs)
        self.head = None if config.tied_embeddings else linear(width, config.vocab_size, dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        states: tuple[MixerState, ...] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T Vocab"], tuple[MixerState, ...]]:
        """Logits of the token after each token, float32, and the states of the blocks after the last one.

        Args:
            tokens: [B, T]; a whole sequence, or its continuation from states, down to one token at a time.
            states: one per block; None starts anew.
            segment_ids: packed documents; nothing passes from one to the next.
            dropout_key: random key of the config's dropout; None for none, as in evaluation.
        """
        x, after = self.features(tokens, states, segment_ids, dropout_key)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        return logits.astype(jnp.float32), after

    def features(
        self,
        tokens: Int[Array, "B T"],
        states: tuple[MixerState, ...] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[MixerState, ...]]:
        """What the head reads, in the config's dtype, and the states; arguments as of a call."""
        x = self.embedding(tokens)
        after = []
        for i, block in enumerate(self.blocks):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            run = _rematerialized(block, self.config.remat)
            x, state = run(x, None if states is None else states[i], segment_ids, key)
            after.append(state)
        return self.norm(x), tuple(after)

    def unembedding(self) -> Float[Array, "Vocab D"]:
        """The matrix of the head, a row for each token of the vocabulary: logits are features @ unembedding.T."""
        return self.embedding.embedding[...] if self.head is None else self.head.kernel[...].T


def _rematerialized(block: Block, remat: str) -> Callable[..., tuple[jax.Array, MixerState]]:
    """The block, keeping for its gradient what ModelConfig.remat says and computing the rest again."""
    if remat == "none":
        return block
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "blocks" else None
    return jax.checkpoint(lambda *args: block(*args), policy=kept)
