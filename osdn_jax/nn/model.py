"""The causal language model: embedding, residual blocks, norm and head."""

import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from osdn_jax.nn import arguments, initializers
from osdn_jax.nn.attention import AttentionState, SoftmaxAttention
from osdn_jax.nn.config import (
    MLP,
    AttentionConfig,
    LatentAttentionConfig,
    MixerConfig,
    MixtureConfig,
    ModelConfig,
)
from osdn_jax.nn.latent_attention import LatentAttention, LatentState
from osdn_jax.nn.layers import RMSNorm, SwiGLU, dropout, embed, linear
from osdn_jax.nn.mixer import DeltaMixer, MixerState
from osdn_jax.nn.mixture import MixtureOfExperts
from osdn_jax.nn.parallel import look_up, over_mesh
from osdn_jax.nn.sharding import ambient_mesh, constrain, module_with_auto_axes, refuse_mesh
from osdn_jax.ops import checks

BlockState = MixerState | AttentionState | LatentState
"""State of a block between calls, that of its mixer: the type of the elements of a model's states."""


_MIXERS: dict[type, Any] = {
    MixerConfig: DeltaMixer,
    AttentionConfig: SoftmaxAttention,
    LatentAttentionConfig: LatentAttention,
}
_STATES = {MixerConfig: MixerState, AttentionConfig: AttentionState, LatentAttentionConfig: LatentState}


class Block(nnx.Module):
    """A residual block: x + mixer(norm(x)), then x + mlp(norm(x)); in a post-norm block x + norm(mixer(x)) and so on.

    Args:
        config: the configuration of the whole model.
        number: index of the block in `config.stack`. Default: 0.
        rngs: random streams for the parameters.
    """

    def __init__(self, config: ModelConfig, number: int = 0, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        arguments.module(config, ModelConfig, rngs)
        own, dtype = config.stack[number], jnp.dtype(config.dtype)
        norm = (config.width, config.norm_epsilon, config.norm_offset)
        self.config, self.dropout = own, config.dropout
        self.mixer_norm = RMSNorm(*norm, rngs=rngs)
        self.mixer = _MIXERS[type(own.mixer)](own.mixer, config.depth, dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(*norm, rngs=rngs)
        self.mlp = _mlp(own.mlp, config, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: BlockState | None,
        segment_ids: Int[Array, "B T"] | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockState | None]:
        """Apply the block.

        Args:
            x: the residual stream, [B, T, D].
            state: the mixer's state before the first token; None at the start of a sequence.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            dropout_key: random key of the config's dropout; None for no dropout.

        Returns:
            The residual stream after the block, and the mixer's state after the last token (None over a mesh).

        Raises:
            ValueError: a state over a mesh.
        """
        return self.balanced(x, state, segment_ids, dropout_key)[:2]

    def balanced(
        self,
        x: Float[Array, "B T D"],
        state: BlockState | None,
        segment_ids: Int[Array, "B T"] | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockState | None, Float[Array, ""] | None]:
        """Apply the block and return the load-balancing loss of its mixture too, None for another MLP.

        The arguments and errors are those of a call.
        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        pre = self.config.norm == "pre"
        mixed, state = self._mix(self.mixed(x), state, segment_ids)
        x = x + dropout(mixed if pre else self.mixer_norm(mixed), self.dropout, keys[0])
        out, balance = self._apply_mlp(self.mlp_norm(x) if pre else x)
        return x + dropout(out if pre else self.mlp_norm(out), self.dropout, keys[1]), state, balance

    def mixed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what the mixer is applied to: the normalised stream, or in a post-norm block the stream itself."""
        return self.mixer_norm(x) if self.config.norm == "pre" else x

    def preconditioner(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None) -> dict[str, jax.Array]:
        """Return the statistics of `CausalLM.preconditioners` for this block.

        Raises:
            ValueError: the block's mixer has no preconditioner.
        """
        config = self.mixer.config
        if getattr(config, "preconditioner", "none") == "none":
            raise ValueError("preconditioners: got a block whose mixer has none")
        d = self.mixer.multipliers(self.mixed(x), segment_ids)
        statistics = {"mean": jnp.mean(d), "min": jnp.min(d), "max": jnp.max(d)}
        if config.preconditioner == "hypergradient" and config.hypergradient.bounds is not None:
            lo, hi = config.hypergradient.bounds
            statistics["clipped"] = jnp.mean(((d <= lo) | (d >= hi)).astype(d.dtype))
        return statistics

    def _apply_mlp(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        mesh, mlp = ambient_mesh(), cast(Any, self.mlp)
        if isinstance(mlp, MixtureOfExperts):
            experts, weights, balance = mlp.route(x)  # over a mesh each device needs the whole router's choice
            if mesh is None:
                return mlp.mix(x, experts, weights), balance
            return over_mesh(mlp, "mlp", MixtureOfExperts.mix, mesh, x, experts, weights), balance
        return mlp(x) if mesh is None else over_mesh(mlp, "mlp", lambda mlp, x: mlp(x), mesh, x), None

    def _mix(
        self, x: jax.Array, state: BlockState | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, BlockState | None]:
        mesh = ambient_mesh()
        if mesh is None:
            return self.mixer(x, state, segment_ids)
        if state is not None:
            raise ValueError("states: got some over a mesh, expected None; decode without jax.set_mesh")
        axis = "context" if mesh.shape["context"] > 1 else None
        return over_mesh(
            self.mixer, "mixer", lambda mixer, x, ids: mixer(x, None, ids, axis)[0], mesh, x, segment_ids
        ), None


def _mlp(mlp: MLP, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(mlp, MixtureConfig):
        return MixtureOfExperts(mlp, config.width, config.depth, dtype, rngs=rngs)
    return SwiGLU(config.width, mlp.hidden, config.depth, dtype, mlp.activation, rngs=rngs)


class CausalLM(nnx.Module):
    """A causal language model over tokens; positions come from the recurrence, or from attention's rotations.

    Args:
        config: sizes and rule, or the blocks of a hybrid.
        rngs: random streams; `params` initialises the parameters.

    Example:
        A model, the logits of a prompt (prefill), then one token at a time from the states (decoding):

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=16, heads=2, key_dim=8, value_dim=8)
        >>> config = nn.ModelConfig(vocab_size=32, layers=1, mixer=mixer, mlp_dim=32)
        >>> model = nn.CausalLM(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
        >>> logits, states = model(tokens[:, :4])
        >>> logits.shape
        (1, 4, 32)
        >>> logits, states = model(tokens[:, 4:], states)
        >>> logits.shape
        (1, 1, 32)

        A training step, on the model as a pure function of its parameters:

        >>> import optax
        >>> apply, parameters = nn.split_model(model)
        >>> optimizer = optax.adamw(1e-2, weight_decay=0.1, mask=nn.weight_decay_mask(model))
        >>> batch = {
        ...     "inputs": tokens[:, :-1],
        ...     "targets": tokens[:, 1:],
        ...     "segment_ids": jnp.zeros((1, 4), jnp.int32),
        ...     "weights": jnp.ones((1, 4)),
        ... }
        >>> @jax.jit
        ... def step(parameters, optimizer_state, batch):
        ...     def loss(parameters):
        ...         sums = nn.likelihood_sums(apply, parameters, batch)
        ...         return sums.nats / sums.targets
        ...     value, gradient = jax.value_and_grad(loss)(parameters)
        ...     updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        ...     return optax.apply_updates(parameters, updates), optimizer_state, value
        >>> optimizer_state = optimizer.init(parameters)
        >>> parameters, optimizer_state, before = step(parameters, optimizer_state, batch)
        >>> parameters, optimizer_state, after = step(parameters, optimizer_state, batch)
        >>> bool(after < before)
        True
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        arguments.module(config, ModelConfig, rngs)
        self.config = config
        self.origin: Hashable = None  # what `interop.load_pretrained` notes about the folder that it read
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.embedding = nnx.Embed(
            config.vocab_size, width, dtype=dtype, embedding_init=initializers.embedding, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, number, rngs=rngs) for number in range(config.depth)])
        self.norm = RMSNorm(width, config.norm_epsilon, config.norm_offset, rngs=rngs)
        self.head = None if config.tied_embeddings else linear(width, config.vocab_size, dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        states: tuple[BlockState, ...] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T Vocab"], tuple[BlockState | None, ...]]:
        """Return the logits of the token after each token, and the blocks' states after the last one.

        Under `jax.set_mesh` of a mesh with the axes `nn.MESH_AXES` the model runs on its devices and keeps no states.

        Args:
            tokens: [B, T] integers: a whole sequence, or its continuation from `states`, down to one token at a time.
                A token outside the vocabulary has an embedding of NaN.
            states: one per block, as returned by an earlier call; None at the start of a sequence.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            dropout_key: random key of the config's dropout; None (the default) for no dropout, as in evaluation.

        Returns:
            (logits [B, T, vocabulary] in float32, states); the states are None over a mesh.

        Raises:
            ValueError: tokens are not [B, T]; segment_ids have another shape; states are not one per block, or belong
                to another batch size or config.
            TypeError: tokens or segment_ids are not integers; the states are those of another type of mixer.
        """
        tokens = self._check_tokens(tokens)
        return module_with_auto_axes(CausalLM._logits, self, tokens, states, segment_ids, dropout_key)

    def _logits(self, tokens: jax.Array, *more: Any) -> tuple[jax.Array, tuple[BlockState | None, ...]]:
        x, after, _ = self._features(tokens, *more)
        logits = constrain(self.embedding.attend(x) if self.head is None else self.head(x), "batch", "time", None)
        return logits.astype(jnp.float32), after

    def features(
        self,
        tokens: Int[Array, "B T"],
        states: tuple[BlockState | None, ...] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[BlockState | None, ...]]:
        """Return the inputs of the head [B, T, D] in the config's dtype, and the states.

        The arguments and errors are those of a call.
        """
        return self.balanced_features(tokens, states, segment_ids, dropout_key)[:2]

    def balanced_features(
        self,
        tokens: Int[Array, "B T"],
        states: tuple[BlockState | None, ...] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[BlockState | None, ...], Float[Array, ""]]:
        """Return the inputs of the head, the states, and the load-balancing loss: its mean over the mixtures.

        The arguments and errors are those of a call. The loss is 1 if all experts have equal shares (arXiv 2101.03961,
        equation 4), and 0 for a model without a mixture.
        """
        tokens = self._check_tokens(tokens)
        return module_with_auto_axes(CausalLM._features, self, tokens, states, segment_ids, dropout_key)

    def _features(
        self, tokens: jax.Array, states: Any, segment_ids: jax.Array | None, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, tuple[BlockState | None, ...], jax.Array]:
        if segment_ids is not None:
            segment_ids = checks.segment_ids(segment_ids, tokens.shape)
        if states is not None:
            self._check_states(states)
        x = self._embed(tokens)
        after, balances = [], []
        for i, block in enumerate(self.blocks):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            graph, parameters = nnx.split(block)
            before = None if states is None else states[i]
            x, state, balance = _run(parameters, x, before, segment_ids, key, graph=graph, remat=self.config.remat)
            after.append(state)
            balances += [] if balance is None else [balance]
        mean = jnp.mean(jnp.stack(balances)) if balances else jnp.zeros((), jnp.float32)
        return self.norm(x), tuple(after), mean

    def with_config(self, config: ModelConfig) -> "CausalLM":
        """Return a model with these parameters and another configuration, such as another `max_length` of the caches.

        Args:
            config: with parameters of the same names and shapes.

        Raises:
            ValueError: a model of this configuration has other parameters.
        """
        abstract = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
        graph, expected = nnx.split(abstract)
        parameters = nnx.state(self)
        shapes = [
            {path: x.get_value().shape for path, x in nnx.to_flat_state(state)} for state in (parameters, expected)
        ]
        if shapes[0] != shapes[1]:
            odd = [path for path in shapes[0] | shapes[1] if shapes[0].get(path) != shapes[1].get(path)]
            name = "/".join(map(str, odd[0]))
            raise ValueError(
                f"config: got one whose model has {name} of shape {shapes[1].get(odd[0])}, expected that of this "
                f"model, {shapes[0].get(odd[0])} ({len(odd)} parameters differ)"
            )
        model = nnx.merge(graph, parameters)
        model.origin = self.origin
        return model

    def start_states(self, batch: int) -> tuple[BlockState, ...]:
        """Return the states before the first token, for `batch` rows.

        Raises:
            ValueError: batch is negative, or a call under `jax.set_mesh`, over which models keep no states.
            TypeError: batch is not an int.
        """
        batch = arguments.count("batch", batch, 0)
        refuse_mesh("start_states")
        return cast(tuple[BlockState, ...], self(jnp.zeros((batch, 0), jnp.int32))[1])

    def restart(self, states: tuple[BlockState, ...], rows: Bool[Array, " B"]) -> tuple[BlockState, ...]:
        """Return the states with these rows reset, so that their next token starts a new sequence.

        Args:
            states: one per block, as returned by an earlier call.
            rows: [B], True for the rows that start again.

        Raises:
            ValueError: states are not one per block, or belong to another config; or rows have another length than the
                states.
            TypeError: rows are not booleans; the states are those of another type of mixer.
        """
        self._check_states(states)
        batch = jax.tree.leaves(states[0])[0].shape[0]
        if not isinstance(rows, (jax.Array, np.ndarray)):
            raise TypeError(f"rows: got {arguments.type_name(rows)}, expected an array of booleans [B]")
        if rows.dtype != jnp.bool_:
            raise TypeError(f"rows: got {rows.dtype}, expected booleans")
        if rows.shape != (batch,):
            raise ValueError(f"rows: got shape {rows.shape}, expected ({batch},), one for each row of the states")
        start = self.start_states(rows.shape[0])

        def select(fresh: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), fresh.astype(old.dtype), old)

        restarted: list[BlockState] = []
        for i, (fresh, old) in enumerate(zip(start, states, strict=True)):
            arguments.like_start(f"states[{i}]", old, fresh)
            if isinstance(old, MixerState):  # its rule's state may be a plain `State`, another type of node
                leaves, structure = jax.tree.flatten(old)
                restarted.append(jax.tree.unflatten(structure, map(select, jax.tree.leaves(fresh), leaves)))
            else:  # the tokens before stay in the cache, unseen
                restarted.append(old._replace(start=jnp.where(rows, old.position, old.start)))
        return tuple(restarted)

    def preconditioners(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> dict[str, Float[Array, " L"]]:
        """Return statistics of the factors that the preconditioners multiply keys by, for each of the L blocks.

        Args:
            tokens: [B, T] integers.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.

        Returns:
            {"mean", "min", "max": [L]} over all tokens, heads and channels; for bounded preconditioners also "clipped",
            the fraction of factors on a bound. In a hybrid L counts the blocks that have a preconditioner.

        Raises:
            ValueError: no block has a preconditioner.
        """
        return module_with_auto_axes(CausalLM._preconditioners, self, self._check_tokens(tokens), segment_ids)

    def _preconditioners(self, tokens: jax.Array, segment_ids: jax.Array | None) -> dict[str, jax.Array]:
        x, rows = self._embed(tokens), []
        if segment_ids is not None:
            segment_ids = checks.segment_ids(segment_ids, tokens.shape)
        for block in self.blocks:
            if getattr(block.mixer.config, "preconditioner", "none") != "none":
                rows.append(block.preconditioner(x, segment_ids))
            x, _ = block(x, None, segment_ids)
        if not rows:
            raise ValueError("preconditioners: got a model whose rule has none")
        return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}

    def unembedding(self) -> Float[Array, "Vocab D"]:
        """Return the matrix of the head, a row for each vocabulary entry: logits are features @ unembedding.T."""
        return self.embedding.embedding[...] if self.head is None else self.head.kernel[...].T

    def _check_tokens(self, tokens: jax.Array) -> jax.Array:
        if not isinstance(tokens, (jax.Array, np.ndarray)):
            raise TypeError(f"tokens: got {arguments.type_name(tokens)}, expected an array [B, T]")
        if tokens.ndim != 2:
            raise ValueError(f"tokens: got shape {jnp.shape(tokens)}, expected [B, T]")
        return checks.indices("tokens", tokens, jnp.shape(tokens), "[B, T]", self.config.vocab_size)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding.embedding[...].astype(self.embedding.dtype)
        return embed(table, tokens) if ambient_mesh() is None else look_up(table, tokens)

    def _check_states(self, states: Any) -> None:
        several = isinstance(states, (tuple, list)) and not isinstance(states, BlockState)
        if not several or len(states) != self.config.depth:
            got = f"{len(states)} of them" if several else arguments.described(states)
            raise ValueError(f"states: got {got}, expected a tuple of {self.config.depth}, one per block, or None")
        if ambient_mesh() is not None:
            raise ValueError("states: got some over a mesh, expected None; decode without jax.set_mesh")
        for i, (state, block) in enumerate(zip(states, self.config.stack, strict=True)):
            arguments.mixer_state(f"states[{i}]", state, _STATES[type(block.mixer)])


# Equal blocks have the same graph: as a function of its parameters, a block is traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnames=("graph", "remat"))
def _run(
    parameters: Any,  # the state that `nnx.split` returns
    x: jax.Array,
    state: BlockState | None,
    segment_ids: jax.Array | None,
    dropout_key: jax.Array | None,
    *,
    graph: nnx.GraphDef,
    remat: str,
) -> tuple[jax.Array, BlockState | None, jax.Array | None]:
    """Apply a block; its gradient recomputes what `ModelConfig.remat` does not keep."""

    def block(parameters: Any, *arguments: Any) -> tuple[jax.Array, BlockState | None, jax.Array | None]:
        return nnx.merge(graph, parameters).balanced(*arguments)

    if remat != "none":
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "blocks" else None
        block = jax.checkpoint(block, policy=kept)
    return block(parameters, x, state, segment_ids, dropout_key)
