"""The compiled programs of a generation: start, read a piece of a prompt, and a loop of steps on the device."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from osdn_jax.generation.filters import Settings, draw
from osdn_jax.generation.states import fit_caches, has_caches, narrow, take_rows, widen
from osdn_jax.nn.sharding import refuse_mesh

BLOCK = 64  # tokens that one call of the loop can read and draw
ENDED = -2  # in place of tokens of rows that have ended


class Functions(NamedTuple):
    """A language model as pure functions of its parameters.

    Attributes:
        start: (parameters, B) -> the states before any text.
        restart: (parameters, states, rows [B]) -> the states, with those of some rows put back to the start.
        read: (parameters, tokens [B, T], states, segment_ids) -> states; states of None start the sequences.
        step: (parameters, tokens [B], states) -> (logits [B, vocabulary], states).
    """

    start: Callable[..., Any]
    restart: Callable[..., Any]
    read: Callable[..., Any]
    step: Callable[..., tuple[jax.Array, Any]]


class Forced(NamedTuple):
    """Tokens that the loop reads before it draws: the rest of short prompts.

    Attributes:
        tokens: [B, BLOCK].
        length: number of them, of each row.
    """

    tokens: Int[Array, "B N"]
    length: Int[Array, ""]


class Programs:
    """The programs of one model, compiled on first use for each shape.

    Args:
        functions: the model.
        state_dtype: dtype in which recurrent states and attention caches are kept; None for that of the model.
        sized: attention caches have room for all tokens. Default: False, the oldest tokens drop out of them.
    """

    def __init__(self, functions: Functions, state_dtype: Any = None, *, sized: bool = False) -> None:
        """Compile nothing yet."""
        self._functions, self._dtype, self._sized = functions, state_dtype, sized
        self.traced: list[str] = []
        self.start = _Program(self._start, static=(1,))
        self.read = _Program(self._read, donated=(2,))
        self.loop = _Program(self._loop, donated=(1,))
        self.step = _Program(self._step)
        self.adopt = _Program(self._adopt)

    def start_shapes(self, parameters: Any, rows: int) -> Any:
        """Return the shapes of the blocks' states before any text."""
        return jax.eval_shape(lambda parameters: self.start_of(parameters, rows), parameters)

    def _start(self, parameters: Any, rows: int) -> Any:
        self.traced.append("start")
        return self.start_of(parameters, rows)

    def start_of(self, parameters: Any, rows: int) -> Any:
        """Return the blocks' states before any text."""
        return narrow(self._functions.start(parameters, rows), self._dtype)

    def _read(
        self,
        parameters: Any,
        tokens: Int[Array, "B T"],
        blocks: Any,
        segment_ids: Int[Array, "B T"] | None,
        reset: Bool[Array, " B"] | None,
    ) -> Any:
        """Return the blocks' states after a piece of a prompt; rows of `reset` are put back to the start after it."""
        self.traced.append("read")
        if blocks is None and not self._sized and has_caches(self.start_shapes(parameters, len(tokens))):
            # Without states all tokens of a piece see each other; what a token sees must not depend on the pieces.
            blocks = self.start_of(parameters, len(tokens))
        blocks = widen(blocks, self._dtype)
        blocks = self._functions.read(parameters, tokens, blocks, segment_ids)
        if reset is not None:
            blocks = self._functions.restart(parameters, blocks, reset)
        return narrow(blocks, self._dtype)

    def _adopt(self, parameters: Any, blocks: Any, rows: Int[Array, " R"]) -> Any:
        """Return copies of some rows of the blocks' states, with attention caches of the size of this model."""
        self.traced.append("adopt")
        shapes = self.start_shapes(parameters, rows.shape[0])
        fitting = fit_caches(take_rows(blocks, rows), shapes)
        return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), fitting, shapes)

    def _step(self, parameters: Any, blocks: Any, token: Int[Array, " B"]) -> tuple[jax.Array, Any]:
        """Return the logits after a token of each row, and the blocks' states after it."""
        self.traced.append("step")
        return self.step_of(parameters, blocks, token)

    def step_of(self, parameters: Any, blocks: Any, token: Int[Array, " B"]) -> tuple[jax.Array, Any]:
        """Return the logits after a token of each row, and the blocks' states after it."""
        logits, blocks = self._functions.step(parameters, token, widen(blocks, self._dtype))
        return logits, narrow(blocks, self._dtype)

    def _loop(
        self,
        parameters: Any,
        carried: tuple[Any, jax.Array, jax.Array],
        ended: Bool[Array, " B"],
        settings: Settings,
        forced: Forced,
        first: Int[Array, ""],
        limit: Int[Array, ""],
    ) -> tuple[tuple[Any, jax.Array, jax.Array], jax.Array, jax.Array]:
        """Read tokens and draw the next ones until all rows have ended, `limit` times at most.

        Args:
            parameters: the model's parameters.
            carried: (blocks' states, last tokens [B], tokens seen [B, vocabulary]), as in a `GenerationState`.
            ended: [B], rows that have ended before.
            settings: settings of each row.
            forced: tokens that are read before any is drawn.
            first: index of the first drawn token in its continuation.
            limit: number of tokens, the forced ones included; at most BLOCK.

        Returns:
            (carried after it, the rows that have ended, tokens [B, BLOCK]: those drawn, after `forced.length` columns
            without meaning; ENDED for rows that had ended, -1 where no token could be drawn).
        """
        self.traced.append("loop")
        rows = jnp.arange(ended.shape[0], dtype=jnp.int32)

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            i, _, ended, _ = carry
            return (i < limit) & ~jnp.all(ended)

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, (blocks, token, seen), ended, out = carry
            logits, blocks = self.step_of(parameters, blocks, token)
            number = first + i - forced.length
            given = jax.lax.dynamic_index_in_dim(forced.tokens, i, axis=1, keepdims=False)
            new = jax.lax.cond(
                i < forced.length, lambda: given, lambda: draw(logits, seen, settings, jnp.maximum(number, 0))
            )
            out = jax.lax.dynamic_update_index_in_dim(out, jnp.where(ended, ENDED, new), i, axis=1)
            token = jnp.where(ended, token, jnp.maximum(new, 0))
            seen = seen.at[rows, token].set(True)
            last = settings.stop[rows, token] | (number + 1 >= settings.max_tokens) | (new < 0)
            return i + 1, (blocks, token, seen), ended | ((i >= forced.length) & last), out

        out = jnp.full((ended.shape[0], BLOCK), ENDED, jnp.int32)
        _, carried, ended, out = jax.lax.while_loop(unfinished, body, (jnp.int32(0), carried, ended, out))
        return carried, ended, out


class _Program:
    """A jitted function, some of whose calls use an executable that was compiled before."""

    def __init__(
        self, function: Callable[..., Any], *, donated: tuple[int, ...] = (), static: tuple[int, ...] = ()
    ) -> None:
        self._jitted = jax.jit(function, donate_argnums=donated, static_argnums=static)
        self._static, self._compiled = static, dict[Hashable, Any]()

    def __call__(self, *arguments: Any) -> Any:
        """Run it, compiled for these shapes if they are new."""
        refuse_mesh()
        if self._compiled and (executable := self._compiled.get(_shapes(arguments))) is not None:
            return executable(*[x for i, x in enumerate(arguments) if i not in self._static])
        return self._jitted(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """Compile it for arguments of these shapes, on one device; return the shapes of its results."""
        refuse_mesh()
        lowered = self._jitted.lower(*arguments)
        self._compiled[_shapes(arguments)] = lowered.compile()
        return lowered.out_info


def _shapes(arguments: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((jnp.shape(x), str(jnp.result_type(x))) for x in leaves)
