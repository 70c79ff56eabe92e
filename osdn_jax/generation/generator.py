"""Generation with a language model: batches of prompts, streams of text, and states that are kept."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.generation import arguments
from osdn_jax.generation.model import Model
from osdn_jax.generation.programs import BLOCK
from osdn_jax.generation.prompt_cache import PromptCache
from osdn_jax.generation.request import Options, Request
from osdn_jax.generation.rows import Chunk, Finish, Row
from osdn_jax.generation.shapes import PIECE, ROWS, SHORTEST
from osdn_jax.generation.state_files import read_state, write_state
from osdn_jax.generation.states import GenerationState
from osdn_jax.generation.stopper import TextTokenizer
from osdn_jax.nn import CausalLM
from osdn_jax.nn.arguments import shown
from osdn_jax.nn.sharding import refuse_mesh

Prompt = str | Sequence[int] | Int[np.ndarray, " T"]


class Continuation(NamedTuple):
    """The continuation of a prompt.

    Attributes:
        tokens: the tokens, with the stop token or the tokens of the stop string that ended them.
        text: their text, without a stop string; "" without a tokenizer.
        finish: why it has ended: "length" (max_tokens), "stop_token" or "stop_string".
    """

    tokens: list[int]
    text: str
    finish: Finish


class Generator:
    """Generates continuations of prompts with one model.

    Prompts are read in pieces, batches of them padded at their start; then one program on the device takes up to 64
    steps per call. Programs are compiled for few shapes: prompts, options and lengths of the same bucket compile
    nothing new. Delta rules keep a state whose size does not depend on the number of tokens; attention keeps a cache
    of as many tokens as prompt and continuation have, rounded up.

    Args:
        model: a `CausalLM`, or (apply, parameters) as `nn.split_model` returns them. A `CausalLM` gets attention caches
            of the size of each request, (apply, parameters) those of its configuration.
        tokenizer: converts prompts and continuations; without one, prompts are tokens. Entries of the vocabulary that
            it does not have are never drawn.
        start_tokens: tokens before a text that starts a document. Default: the tokenizer's `bos_id`.
        stop_tokens: tokens that end a continuation, if a request does not name others. Default: the tokenizer's
            `bos_id`, which starts the next document; without a tokenizer none.
        state_dtype: "bfloat16" keeps recurrent states and attention caches in half the memory; rules still compute in
            float32. Default: None, the model's own.
        piece: tokens of a prompt that are read at a time, a power of two of at least 16. Default: 2048.
        batch_size: prompts at a time, at most. Default: 16.
        token_by_token: the longest prompt, at most 64 tokens, that is read token by token, if all prompts of a batch
            are of one length: by the program that draws, so that no other has to be compiled. Default: 0.

    Raises:
        ValueError: piece, batch_size, token_by_token or state_dtype is out of range, a token is outside the vocabulary,
            or a call under `jax.set_mesh` of a mesh that models run on.
        TypeError: an argument has another type.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=16, heads=2, key_dim=8, value_dim=8)
        >>> config = nn.ModelConfig(vocab_size=32, layers=1, mixer=mixer, mlp_dim=32)
        >>> generator = Generator(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> results = generator.generate([[3, 1, 4], [1, 5, 9, 2, 6]], max_tokens=4, seed=1)
        >>> [len(result.tokens) for result in results], results[0].finish
        ([4, 4], 'length')

        A state that is kept: the prompt is read once, and continued as often as wanted.

        >>> state = generator.prefill([[3, 1, 4]])
        >>> generator.generate([[]], state=state, max_tokens=4, seed=1)[0].tokens == results[0].tokens
        True
    """

    def __init__(
        self,
        model: CausalLM | tuple[Callable[..., Any], Any],
        tokenizer: TextTokenizer | None = None,
        *,
        start_tokens: Sequence[int] | None = None,
        stop_tokens: Sequence[int] | None = None,
        state_dtype: Any = None,
        piece: int = PIECE,
        batch_size: int = ROWS,
        token_by_token: int = 0,
    ) -> None:
        """Check the arguments. Nothing is compiled yet."""
        self.piece = arguments.integer("piece", piece)
        if self.piece < SHORTEST or self.piece & (self.piece - 1):
            raise ValueError(f"piece: got {piece}, expected a power of two of at least {SHORTEST}")
        self.batch_size = arguments.at_least_one("batch_size", batch_size)
        by_token = arguments.integer_between("token_by_token", token_by_token, 0, BLOCK)
        self.tokenizer = None if tokenizer is None else arguments.tokenizer(tokenizer)
        self.model = Model(model, arguments.state_dtype(state_dtype), self.piece, by_token)
        known = () if tokenizer is None else (tokenizer.bos_id,)
        start = known if start_tokens is None else start_tokens
        name = "tokenizer.bos_id" if start_tokens is None else "start_tokens"
        self._start = arguments.tokens(name, start, self.vocabulary, empty=True)
        ends, name = (known, "tokenizer.bos_id") if stop_tokens is None else (stop_tokens, "stop_tokens")
        self.stop_tokens = arguments.token_set(name, ends, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Number of logits of the model."""
        return self.model.vocabulary

    @property
    def parameters(self) -> Any:
        """The model's parameters. They may be shapes until something runs, and are then set."""
        return self.model.parameters

    @parameters.setter
    def parameters(self, parameters: Any) -> None:
        self.model.parameters = parameters

    @property
    def compilations(self) -> int:
        """Number of programs that have been compiled."""
        return self.model.compilations

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        state: GenerationState | None = None,
        progress: Callable[[int], object] = lambda done: None,
        **options: Unpack[Options],
    ) -> list[Continuation]:
        """Return the continuation of each prompt.

        Args:
            prompts: texts, or tokens, at least one in each; a text follows the start of a document. With a state they
                may be empty, and a text is encoded as if a document began with it, without the start.
            state: what comes before the prompts, of as many rows, or of one row that all prompts follow; it can be used
                again. Default: None, prompts start documents.
            progress: called with the number of prompts that are done since its last call.
            **options: as in `Options`.

        Raises:
            ValueError: an option is out of range, a token is outside the vocabulary, a prompt is empty, the state is of
                another model; or the logits of a token are NaN, or -inf for all allowed tokens.
            TypeError: an argument has another type, or an option is unknown.
        """
        if not callable(progress):
            raise TypeError(f"progress: got {shown(progress)}, expected a function")
        stream = self.stream(prompts, state=state, **options)
        tokens: list[list[int]] = [[] for _ in prompts]
        texts: list[list[str]] = [[] for _ in prompts]
        finishes: list[Finish] = ["length"] * len(prompts)
        for chunk in stream:
            tokens[chunk.prompt] += [] if chunk.token is None else [chunk.token]
            texts[chunk.prompt].append(chunk.text)
            if chunk.finish is not None:
                finishes[chunk.prompt] = chunk.finish
                progress(1)
        found = zip(tokens, texts, finishes, strict=True)
        return [Continuation(ids, "".join(text), finish) for ids, text, finish in found]

    def stream(
        self, prompts: Sequence[Prompt], *, state: GenerationState | None = None, **options: Unpack[Options]
    ) -> Iterator[Chunk]:
        """Yield the tokens of the continuations, as they are generated: some of one prompt, some of the next.

        The arguments and errors are those of `generate`; errors of the arguments are raised by the call itself.
        """
        return self._stream(self._request(prompts, state, options), state)

    def prefill(self, prompts: Sequence[Prompt], *, state: GenerationState | None = None) -> GenerationState:
        """Return the state after prompts, a row for each; `generate` continues it.

        Args:
            prompts: as in `generate`; with a state all of the same number of tokens.
            state: what comes before the prompts, of as many rows; it can be used again. Default: None, prompts start
                documents.

        Raises:
            ValueError: a prompt is empty, or prompts that follow a state differ in length.
            TypeError: an argument has another type.
        """
        texts = self._prompts(prompts, state)
        if not texts:
            raise ValueError("prompts: got none, expected at least one")
        if state is None:
            return self.model.engine(max(map(len, texts))).read(self.model.parameters, texts, len(texts))
        if len({len(text) for text in texts}) > 1:
            lengths = ", ".join(str(len(text)) for text in texts)
            raise ValueError(f"prompts: got {lengths} tokens after a state, expected equal numbers of tokens")
        return self.model.continued(state, list(range(len(texts))), texts)

    def prompt_cache(self, prompt: Prompt, *, keep_every: int = 256) -> PromptCache:
        """Return a prompt with states at every `keep_every` tokens, from each token of which generation can start.

        Args:
            prompt: a text or tokens.
            keep_every: tokens between two states that are kept. Default: 256.

        Raises:
            ValueError: the prompt is empty, or keep_every is below 1.
            TypeError: an argument has another type.
        """
        [text] = self._prompts([prompt], None)
        return PromptCache.read(self.model, text, arguments.at_least_one("keep_every", keep_every))

    def logits(self, state: GenerationState) -> Float[Array, "B Vocab"]:
        """Return the logits of the next token of each row, in float32, from which `generate` draws.

        Raises:
            ValueError: the state is of another model.
        """
        self.model.check(state)
        return self.model.logits(state)

    def save_state(self, path: Any, state: GenerationState | PromptCache) -> None:
        """Write a state, or a prompt cache with all its states, to a file in the format of safetensors.

        Args:
            path: the file; its folder must exist. A reader sees the old content or the new, never part of it.
            state: what `prefill`, `prompt_cache` or `PromptCache.at` returned.

        Raises:
            ValueError: the state is of another model, or path is empty.
            TypeError: an argument has another type.
            OSError: the file cannot be written.
        """
        write_state(path, state, self.model)

    def load_state(self, path: Any) -> Any:
        """Return the `GenerationState` or `PromptCache` of a file, in this generator's state_dtype.

        Args:
            path: a file that `save_state` wrote with the same model.

        Raises:
            ValueError: the file is damaged, no state, or of another model: the message says which of its configuration,
                shapes and weights differs; or path is empty.
            TypeError: path is neither a str nor a path.
            OSError: the file cannot be read.
        """
        return read_state(path, self.model)

    def compile(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> None:
        """Compile, on one device, what `generate` needs for the first batch of prompts without a state.

        The parameters may still be shapes; `parameters` is set once they are there.

        The arguments and errors are those of `generate`.
        """
        request = self._request(prompts, None, options)
        for members in request.batches(self.batch_size, equal=False)[:1]:
            self.model.compile(request.batch(members))

    def _prompts(self, prompts: Any, state: GenerationState | None) -> list[Int[np.ndarray, " T"]]:
        refuse_mesh()
        several = isinstance(prompts, Sequence) or (isinstance(prompts, np.ndarray) and prompts.ndim > 0)
        if isinstance(prompts, (str, bytes)) or not several:
            raise TypeError(f"prompts: got {type(prompts).__name__}, expected a sequence of prompts")
        texts = [self._prompt(index, prompt, state is None) for index, prompt in enumerate(prompts)]
        if state is not None:
            rows = self.model.check(state)
            if rows not in (1, len(texts)):
                raise ValueError(f"state: got one of {rows} texts for {len(texts)} prompts, expected 1 or {len(texts)}")
        return texts

    def _prompt(self, index: int, prompt: Any, starts: bool) -> Int[np.ndarray, " T"]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TypeError(f"prompts: got text at {index} without a tokenizer, expected tokens")
            try:
                tokens = self.tokenizer.encode(prompt)
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from error
            prompt = np.concatenate([self._start, tokens]) if starts else tokens
        return arguments.tokens(f"prompts[{index}]", prompt, self.vocabulary, empty=not starts)

    def _request(self, prompts: Any, state: GenerationState | None, options: Any) -> Request:
        given = {"stop_tokens": self.stop_tokens, **options}
        texts = self._prompts(prompts, state)
        request = Request(texts, self.vocabulary, self.tokenizer, given)
        self.model.check_room(texts, request.max_tokens, state)
        return request

    def _stream(self, request: Request, state: GenerationState | None) -> Iterator[Chunk]:
        # The text of a token may depend on those before it, of which a state has the last one.
        last = None if state is None else np.asarray(state.token)
        # Rows of a state continue it with equal numbers of tokens.
        for members in request.batches(self.batch_size, equal=state is not None):
            batch, rows = request.batch(members), []
            run = self.model.run(batch, state)
            for index, text in zip(members, batch.texts, strict=True):
                before = [] if last is None else [int(last[index if len(last) > 1 else 0])]
                row = Row(index, [*before, *text.tolist()], request, self.tokenizer)
                rows.append(row)
                if row.finish is not None:
                    yield row.chunk(None)
            for block in run:
                for place, row in enumerate(rows):
                    for token in block[place].tolist():
                        if row.finish is None:  # the tokens of a block after a stop string mean nothing
                            yield row.chunk(token)
                    run.stopped[place] |= row.finish is not None
