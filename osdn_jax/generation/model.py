"""A model with its programs for each size of attention caches, and what is done with its states."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.generation import arguments
from osdn_jax.generation.engine import Engine, Run
from osdn_jax.generation.functions import Functions, of_language_model, vocabulary_of_language_model
from osdn_jax.generation.programs import BLOCK, Programs
from osdn_jax.generation.request import Batch
from osdn_jax.generation.shapes import LONGEST_CACHE, cache_length
from osdn_jax.generation.states import GenerationState, has_caches, is_cache, narrow
from osdn_jax.nn import CausalLM, ModelConfig
from osdn_jax.nn.arguments import shown
from osdn_jax.nn.split import split_model

_MOST = 2**31 - 1  # the largest number of tokens in a state; that of longer texts is this one


class Model:
    """A language model that texts are continued with.

    Args:
        model: a `CausalLM`, or (apply, parameters); the parameters may be shapes until something runs.
        state_dtype: dtype of recurrent states and attention caches, or None.
        piece: tokens of a prompt that are read at a time.
        token_by_token: the longest texts that the program that draws reads.

    Attributes:
        parameters: the model's parameters; they may be set after programs were compiled for their shapes.
        config: the configuration of a `CausalLM`, else None.
        vocabulary: number of logits.
    """

    def __init__(self, model: Any, state_dtype: Any, piece: int, token_by_token: int) -> None:
        """Check the model. Nothing is compiled yet."""
        self.state_dtype, self._piece, self._token_by_token = state_dtype, piece, token_by_token
        self.config: ModelConfig | None = None
        self._model: CausalLM | None = None
        if isinstance(model, CausalLM):
            self._model, self.config = model, model.config
            apply, self.parameters = split_model(model)
        elif isinstance(model, tuple) and len(model) == 2 and callable(model[0]):
            apply, self.parameters = model
        else:
            name = type(model).__name__
            raise TypeError(f"model: got {name}, expected an nn.CausalLM or (apply, parameters) of nn.split_model")
        self._functions = of_language_model(apply)
        self.vocabulary = vocabulary_of_language_model(apply, self.parameters)
        self._shapes: dict[int, Any] = {}
        self._sized = self._model is not None and has_caches(self.start_shapes(1))
        self._engines: dict[int | None, Engine] = {}

    @property
    def compilations(self) -> int:
        """Number of programs that have been compiled."""
        return sum(len(engine.programs.traced) for engine in self._engines.values())

    def start_shapes(self, rows: int) -> Any:
        """Return the shapes of the blocks' states, with attention caches of the configuration's size."""
        if rows not in self._shapes:
            start = lambda parameters: narrow(self._functions.start(parameters, rows), self.state_dtype)
            self._shapes[rows] = jax.eval_shape(start, self.parameters)
        return self._shapes[rows]

    def engine(self, tokens: int) -> Engine:
        """Return the programs for texts of up to this number of tokens, their continuations included."""
        size = cache_length(tokens) if self._sized else None
        if size not in self._engines:
            functions = self._functions if size is None else self._with_caches(size)
            programs = Programs(functions, self.state_dtype, sized=self._sized)
            self._engines[size] = Engine(programs, self.vocabulary, self._piece)
        return self._engines[size]

    def _with_caches(self, size: int) -> Functions:
        model: Any = self._model
        return of_language_model(split_model(model.with_config(model.config.with_max_length(size)))[0])

    def run(self, batch: Batch, state: GenerationState | None) -> Run:
        """Return the continuation of a batch, of which nothing is computed yet but the prompts.

        Args:
            batch: the prompts; with a state all of one length.
            state: what comes before all prompts of the request, or None.
        """
        members, texts, settings, longest = batch
        rows = len(settings.max_tokens)
        if state is not None:
            continued = self.continued(state, members, texts, rows=rows, longest=longest)
            return Run(self.engine(int(np.max(continued.length)) + longest), self.parameters, continued, settings)
        engine = self.engine(max(map(len, texts)) + longest)
        if self._reads_in_loop(texts):
            padded = [*texts, *[texts[0]] * (rows - len(texts))]
            forced = np.stack([text[1:] for text in padded])
            return Run(engine, self.parameters, engine.start(self.parameters, padded), settings, forced)
        return Run(engine, self.parameters, engine.read(self.parameters, texts, rows), settings)

    def compile(self, batch: Batch) -> None:
        """Compile what `run` needs for a batch without a state, on one device; the parameters may still be shapes."""
        texts, rows = batch.texts, len(batch.settings.max_tokens)
        engine = self.engine(max(map(len, texts)) + batch.longest)
        if not self._reads_in_loop(texts):
            engine.compile_loop(self.parameters, engine.compile_read(self.parameters, texts, rows), batch.settings)
            return
        with ThreadPoolExecutor(1) as beside:
            starting = beside.submit(engine.compile_start, self.parameters, rows)
            engine.compile_loop(self.parameters, engine.start_shapes(self.parameters, rows), batch.settings)
            starting.result()

    def _reads_in_loop(self, texts: Sequence[Int[np.ndarray, " T"]]) -> bool:
        lengths = {len(text) for text in texts}
        return len(lengths) == 1 and max(lengths) <= min(self._token_by_token, BLOCK)

    def continued(
        self,
        state: GenerationState,
        members: Sequence[int],
        texts: Sequence[Int[np.ndarray, " T"]],
        *,
        rows: int | None = None,
        longest: int = 0,
    ) -> GenerationState:
        """Return the state after more tokens, as many in each of its rows; the state given stays as it is.

        Args:
            state: a state of several rows, or of one that all texts follow.
            members: rows of the state.
            texts: the tokens that follow each of them.
            rows: rows of the new state; the last member is repeated. Default: the number of members.
            longest: tokens that will follow, at most, for which attention caches have room. Default: 0.
        """
        missing = (rows or len(members)) - len(members)
        chosen = np.asarray([*members, *[members[-1]] * missing], np.int32)
        if len(state.token) == 1:
            chosen = np.zeros_like(chosen)
        tokens = np.stack([*texts, *[texts[-1]] * missing]).astype(np.int32)
        length = np.minimum(np.asarray(state.length, np.int64)[chosen] + tokens.shape[1], _MOST).astype(np.int32)
        engine = self.engine(int(length.max()) + longest)
        blocks = engine.programs.adopt(self.parameters, state.blocks, chosen)
        last = np.asarray(state.token, np.int32)[chosen]
        seen = np.asarray(state.seen)[chosen]
        if tokens.shape[1]:
            blocks = engine.read_exactly(
                self.parameters, blocks, np.concatenate([last[:, None], tokens[:, :-1]], axis=1)
            )
            last = tokens[:, -1]
            seen[np.arange(len(seen))[:, None], tokens] = True
        return GenerationState(blocks, last, seen, length)  # type: ignore[arg-type]  # NumPy arrays

    def logits(self, state: GenerationState) -> Float[Array, "B Vocab"]:
        """Return the logits of the next token of each row."""
        engine = self.engine(int(np.max(state.length)) + 1)
        blocks = engine.programs.adopt(self.parameters, state.blocks, np.arange(len(state.token), dtype=np.int32))
        return engine.programs.step(self.parameters, blocks, state.token)[0]

    def check(self, state: Any) -> int:
        """Return the number of rows of a state. Raises TypeError or ValueError if it is not one of this model."""
        if not isinstance(state, GenerationState):
            raise TypeError(f"state: got {type(state).__name__}, expected a GenerationState")
        token = _field(state, "token", np.integer, "integers [B]")
        rows = len(token)
        length = _field(state, "length", np.integer, "integers [B]", rows)
        seen = _field(state, "seen", np.bool_, "booleans [B, vocabulary]", rows)
        if seen.shape[1] != self.vocabulary:
            raise ValueError(
                f"state: got one of a model with {seen.shape[1]} vocabulary entries, expected {self.vocabulary}"
            )
        arguments.tokens("state.token", token, self.vocabulary)
        for number in np.asarray(length).tolist():
            arguments.integer_between("state.length", number, 1, LONGEST_CACHE - 1 if self._sized else _MOST)
        self.check_blocks(state.blocks, rows)
        return rows

    def check_room(self, texts: Sequence[Any], max_tokens: Sequence[int], state: GenerationState | None) -> None:
        """Raise ValueError if texts, with what comes before and after them, are too long for an attention cache."""
        before = 0 if state is None else int(np.max(state.length))
        for text, most in zip(texts, max_tokens, strict=True):
            if self._sized and before + len(text) + most > LONGEST_CACHE:
                room = LONGEST_CACHE - before - len(text)
                raise ValueError(f"max_tokens: got {most}, expected at most {room} with attention after this text")

    def check_blocks(self, blocks: Any, rows: int) -> None:
        """Raise ValueError unless the blocks' states are of this model, with this number of rows."""
        wanted, got = (_shapes(x) for x in (self.start_shapes(rows), blocks))
        for name in sorted(wanted.keys() | got.keys()):
            if wanted.get(name) != got.get(name):
                raise ValueError(
                    f"state: got {_described(got.get(name))} at {name}, expected {_described(wanted.get(name))}: it is "
                    "the state of another model"
                )


def _shapes(blocks: Any) -> dict[str, tuple[Any, ...]]:
    """Return {name: (kind of numbers, shape)} of the blocks' states, those of attention caches without their size."""
    found: dict[str, tuple[Any, ...]] = {}
    for path, node in jax.tree.leaves_with_path(blocks, is_leaf=is_cache):
        name = "blocks" + jax.tree_util.keystr(path)
        fields = {f"{name}.{field}": x for field, x in node._asdict().items()} if is_cache(node) else {name: node}
        for field, x in fields.items():
            if not hasattr(x, "shape"):
                found |= {} if x is None else {field: (type(x).__name__,)}
                continue
            kind = "floating-point" if jax.numpy.issubdtype(x.dtype, np.floating) else str(x.dtype)
            shape = tuple(x.shape)
            found[field] = (kind, (*shape[:-2], *shape[-1:]) if is_cache(node) and len(shape) > 2 else shape)
    return found


def _described(found: tuple[Any, ...] | None) -> str:
    if found is None or len(found) == 1:
        return "nothing" if found is None else f"a {found[0]}"
    return f"an array ({found[0]}) of shape {list(found[1])}"


def _field(state: GenerationState, name: str, kind: type, layout: str, rows: int | None = None) -> Any:
    """Return a field of a state. Raises TypeError or ValueError unless it is an array of this kind and layout."""
    field = getattr(state, name)
    if not isinstance(field, (jax.Array, np.ndarray)):
        raise TypeError(f"state.{name}: got {shown(field)}, expected an array of {layout}")
    if not jax.numpy.issubdtype(field.dtype, kind):
        raise TypeError(f"state.{name}: got dtype {field.dtype}, expected {layout}")
    if field.ndim != layout.count(",") + 1 or len(field) == 0 or len(field) != (rows or len(field)):
        expected = layout if rows is None else f"{layout} with a row for each of {rows} tokens"
        raise ValueError(f"state.{name}: got shape {list(field.shape)}, expected {expected}")
    return field
