"""Batches on the device: prompts read in pieces, and blocks of tokens drawn until every row has ended."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from osdn_jax.generation.filters import Settings
from osdn_jax.generation.programs import BLOCK, ENDED, Forced, Programs
from osdn_jax.generation.shapes import exact_pieces, padded_pieces
from osdn_jax.generation.states import GenerationState

_PATIENCE = 0.1  # seconds; blocks that take longer do not become longer


class _Part(NamedTuple):
    """A piece of a batch of texts: its tokens, and, if there is padding in it, its segments and the rows to reset."""

    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"] | None
    reset: Bool[np.ndarray, " B"] | None


class Engine:
    """Runs the programs of a model on batches of texts.

    Args:
        programs: the programs.
        vocabulary: number of logits.
        piece: tokens of a prompt that are read at a time, a power of two.
    """

    def __init__(self, programs: Programs, vocabulary: int, piece: int) -> None:
        """Compile nothing yet."""
        self.programs, self.vocabulary, self.piece = programs, vocabulary, piece

    def read(self, parameters: Any, texts: Sequence[Int[np.ndarray, " T"]], rows: int) -> GenerationState:
        """Return the state after texts of any lengths, each at least one token.

        Texts are padded at their start, as a packed document before them, so that all of them end at the same place. A
        row whose text starts at the end of a piece, or is a single token, has its state put back to the start there.

        Args:
            parameters: the model's parameters.
            texts: the texts; as many as `rows`, or fewer for rows without meaning at the end.
            rows: number of rows of the state.
        """
        blocks = None
        for part in self._parts(texts, rows):
            blocks = self.programs.read(parameters, part.tokens, blocks, part.segment_ids, part.reset)
        if blocks is None:
            blocks = self.programs.start(parameters, rows)
        return self.state(blocks, texts, rows)

    def _parts(self, texts: Sequence[Int[np.ndarray, " T"]], rows: int) -> Iterator[_Part]:
        """Yield the pieces of all tokens but the last of each text."""
        lengths = np.asarray([len(text) - 1 for text in texts] + [0] * (rows - len(texts)), np.int64)
        pieces = padded_pieces(int(lengths.max()), self.piece)
        total, begin = sum(pieces), 0
        tokens = np.zeros((rows, total), np.int32)
        for row, text in enumerate(texts):
            tokens[row, total - lengths[row] :] = text[:-1]
        first = total - lengths  # where each text starts
        first[len(texts) :] = -1  # rows without meaning are read as text, which needs no mask
        for size in pieces:
            end = begin + size
            ids = reset = None
            if (first > begin).any():
                ids = (np.arange(begin, end)[None] >= first[:, None]).astype(np.int32)
                reset = first >= end
            yield _Part(np.ascontiguousarray(tokens[:, begin:end]), ids, reset)
            begin = end

    def read_exactly(self, parameters: Any, blocks: Any, tokens: Int[np.ndarray, "B T"]) -> Any:
        """Return the blocks' states after more tokens, as many for every row. The states given are used up."""
        begin = 0
        for size in exact_pieces(tokens.shape[1], self.piece):
            part = np.ascontiguousarray(tokens[:, begin : begin + size], np.int32)
            blocks = self.programs.read(parameters, part, blocks, None, None)
            begin += size
        return blocks

    def start(self, parameters: Any, texts: Sequence[Int[np.ndarray, " T"]]) -> GenerationState:
        """Return the state before texts whose tokens after the first are still to be read."""
        return self.state(self.programs.start(parameters, len(texts)), [text[:1] for text in texts], len(texts))

    def start_shapes(self, parameters: Any, rows: int) -> Any:
        """Return the shapes of the blocks' states before any text."""
        return self.programs.start_shapes(parameters, rows)

    def compile_start(self, parameters: Any, rows: int) -> Any:
        """Compile what `start` runs; return the shapes of the blocks' states."""
        return self.programs.start.compile(parameters, rows)

    def compile_read(self, parameters: Any, texts: Sequence[Int[np.ndarray, " T"]], rows: int) -> Any:
        """Compile what `read` runs; return the shapes of the blocks' states."""
        programs, blocks = self.programs, None
        for part in self._parts(texts, rows):
            blocks = programs.read.compile(parameters, part.tokens, blocks, part.segment_ids, part.reset)
        return programs.start.compile(parameters, rows) if blocks is None else blocks

    def compile_loop(self, parameters: Any, blocks: Any, settings: Settings) -> None:
        """Compile the loop for the blocks' states, or their shapes."""
        rows = len(settings.max_tokens)
        numbers = [jax.ShapeDtypeStruct((), np.int32)] * 3
        forced = Forced(jax.ShapeDtypeStruct((rows, BLOCK), np.int32), numbers[0])  # type: ignore[arg-type]
        token, seen = np.zeros(rows, np.int32), np.zeros((rows, self.vocabulary), bool)
        ended = np.zeros(rows, bool)
        self.programs.loop.compile(parameters, (blocks, token, seen), ended, settings, forced, *numbers[1:])

    def state(self, blocks: Any, texts: Sequence[Int[np.ndarray, " T"]], rows: int) -> GenerationState:
        """Return the state after texts, of which the model has read all tokens but the last."""
        token, length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, text in enumerate(texts):
            token[row], length[row] = text[-1], len(text)
        return GenerationState(blocks, token, self.seen(texts, rows), length)  # type: ignore[arg-type]  # NumPy arrays

    def seen(self, texts: Sequence[Int[np.ndarray, " T"]], rows: int) -> np.ndarray:
        """Return a mask [rows, vocabulary] of the tokens of each text."""
        seen = np.zeros((rows, self.vocabulary), bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
        return seen


class Run:
    """The blocks of tokens that continue a state, drawn while it is iterated.

    Args:
        engine: the programs.
        parameters: the model's parameters.
        state: the state that is continued; its arrays are used up.
        settings: settings of each row.
        forced: tokens [B, n] that are read before any is drawn, fewer than BLOCK of each row. Default: none.

    Attributes:
        stopped: [B], rows that the caller has ended; it may set them between two blocks.
        state: the state after the last block. A row that ended before others has read tokens that mean nothing since.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Any,
        state: GenerationState,
        settings: Settings,
        forced: Int[np.ndarray, "B n"] | None = None,
    ) -> None:
        """Draw nothing yet."""
        self._engine, self._parameters = engine, parameters
        self.state: GenerationState = state
        self._settings = settings
        self.stopped = np.asarray(settings.max_tokens) <= 0
        self._forced = np.zeros((len(self.stopped), 0), np.int32) if forced is None else forced

    def __iter__(self) -> Iterator[Int[np.ndarray, "B n"]]:
        """Yield the drawn tokens [B, n]: ENDED where a row has ended, -1 where no token could be drawn."""
        settings = jax.device_put(self._settings)
        count = self._forced.shape[1]
        padded = np.zeros((len(self.stopped), BLOCK), np.int32)
        padded[:, :count] = self._forced
        forced = Forced(padded, np.int32(count))  # type: ignore[arg-type]  # NumPy arrays
        first, wanted, read = 0, 1, self._forced
        while not self.stopped.all():
            begun = time.perf_counter()
            limit = int(forced.length) + wanted
            carried = self.state[:3]
            carried, ended, out = self._engine.programs.loop(
                self._parameters,
                carried,
                self.stopped,
                settings,
                forced,
                np.int32(first),
                np.int32(limit),
            )
            tokens = np.asarray(out)[:, int(forced.length) : limit]
            tokens = tokens[:, : int((tokens != ENDED).any(axis=0).sum())]
            new = (tokens >= 0).sum(axis=1).astype(np.int32) + read.shape[1]
            blocks, token, seen = carried
            self.state = GenerationState(blocks, token, seen, self.state.length + new)
            self.stopped = self.stopped | np.asarray(ended)
            first += tokens.shape[1]
            forced, read = forced._replace(length=np.int32(0)), read[:, :0]  # type: ignore[arg-type]
            if time.perf_counter() - begun < _PATIENCE:
                wanted = min(2 * wanted, BLOCK)
            yield tokens


def copied(tree: Any) -> Any:
    """Return copies of arrays, for a program that uses its arguments up."""
    return jax.tree.map(jnp.copy, tree)
