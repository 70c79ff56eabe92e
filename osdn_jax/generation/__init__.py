"""Generation: prompts read in pieces, tokens drawn in one loop on the device, states that can be kept and saved.

`Generator` continues texts with a language model; `Options` describes the options of a request. `PromptCache` is a
prompt that was read once and is continued from any of its tokens.
"""

from osdn_jax.generation.generator import Continuation, Generator
from osdn_jax.generation.prompt_cache import PromptCache
from osdn_jax.generation.request import Options
from osdn_jax.generation.rows import Chunk
from osdn_jax.generation.states import GenerationState
from osdn_jax.generation.stopper import Stopper

__all__ = ["Chunk", "Continuation", "GenerationState", "Generator", "Options", "PromptCache", "Stopper"]
