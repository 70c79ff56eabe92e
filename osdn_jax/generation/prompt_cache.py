"""A long prompt with states at regular distances, from each token of which generation can start."""

from typing import Any

import numpy as np
from jaxtyping import Int

from osdn_jax.generation import arguments
from osdn_jax.generation.engine import copied
from osdn_jax.generation.model import Model
from osdn_jax.generation.states import GenerationState, number_of_bytes, rewound, without_caches


class PromptCache:
    """A prompt that has been read once; `Generator.prompt_cache` and `Generator.load_state` return one.

    It keeps the recurrent states, preconditioners and convolutions' windows after every `keep_every` tokens, and one
    attention cache for the whole prompt, which serves every token of it. (A sliding window drops tokens: its caches, no
    larger than the window, are kept with every state.)

    Attributes:
        model: the model that has read it.
        tokens: the prompt, [n].
        keep_every: tokens between two states that are kept.
        kept: {number of tokens read: the blocks' states}, without the attention caches that `last` has.
        last: the blocks' states after all tokens but the last.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> from osdn_jax.generation import Generator
        >>> mixer = nn.mixer_config("osdn", width=16, heads=2, key_dim=8, value_dim=8)
        >>> config = nn.ModelConfig(vocab_size=32, layers=1, mixer=mixer, mlp_dim=32)
        >>> generator = Generator(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> cache = generator.prompt_cache([3, 1, 4, 1, 5, 9, 2, 6], keep_every=4)
        >>> [result] = generator.generate([[7]], state=cache.at(5), max_tokens=3)
        >>> result.tokens == generator.generate([[3, 1, 4, 1, 5, 7]], max_tokens=3)[0].tokens
        True
    """

    def __init__(
        self, model: Model, tokens: Int[np.ndarray, " n"], keep_every: int, kept: dict[int, Any], last: Any
    ) -> None:
        """Wrap states that were read or loaded."""
        self.model = model
        self.tokens, self.keep_every, self.kept, self.last = tokens, keep_every, kept, last

    @classmethod
    def read(cls, model: Model, tokens: Int[np.ndarray, " n"], keep_every: int) -> "PromptCache":
        """Read a prompt of at least one token."""
        engine = model.engine(len(tokens))
        blocks = engine.programs.start(model.parameters, 1)
        kept = {0: copied(without_caches(blocks, len(tokens)))}
        for begin in range(0, len(tokens) - 1, keep_every):
            end = min(begin + keep_every, len(tokens) - 1)
            blocks = engine.read_exactly(model.parameters, blocks, tokens[None, begin:end])
            if end == begin + keep_every:
                kept[end] = copied(without_caches(blocks, len(tokens)))
        return cls(model, tokens, keep_every, kept, blocks)

    def at(self, token: int) -> GenerationState:
        """Return the state after the first `token` tokens of the prompt, whose continuation starts there.

        The tokens after the nearest state before them, fewer than `keep_every`, are read again.

        Args:
            token: from 1 to the number of tokens.

        Raises:
            ValueError: token is out of range.
            TypeError: it is not an integer.
        """
        token = arguments.integer("token", token)
        if not 1 <= token <= len(self.tokens):
            raise ValueError(f"token: got {token}, expected 1 to {len(self.tokens)}, the tokens of the prompt")
        begin, blocks = len(self.tokens) - 1, self.last
        if token < len(self.tokens):
            begin = (token - 1) // self.keep_every * self.keep_every
            blocks = rewound(self.kept[begin], self.last, begin)
        read, engine = self.tokens[begin : token - 1], self.model.engine(len(self.tokens))
        blocks = engine.programs.adopt(self.model.parameters, blocks, np.zeros(1, np.int32))
        if len(read):
            blocks = engine.read_exactly(self.model.parameters, blocks, read[None])
        text = self.tokens[:token]
        return GenerationState(blocks, text[-1:], engine.seen([text], 1), np.asarray([token], np.int32))  # type: ignore[arg-type]  # NumPy arrays

    @property
    def state(self) -> GenerationState:
        """The state after the whole prompt."""
        return self.at(len(self.tokens))

    @property
    def number_of_bytes(self) -> int:
        """Memory of all states, in bytes."""
        return number_of_bytes((self.kept, self.last))
