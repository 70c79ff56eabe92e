"""Models of other libraries, in and out: folders with config.json and safetensors files.

`load_pretrained` reads such a folder as an `nn.CausalLM`, also straight onto a mesh, and `logits` runs it;
`replace_rule` gives layers another preconditioner or decay; `save_pretrained` writes the layout that the other library
reads, or our own. docs/interop.md lists the models.
"""

from osdn_jax.interop.families import FAMILIES
from osdn_jax.interop.family import Family
from osdn_jax.interop.inspection import Inspection, inspect
from osdn_jax.interop.loading import assembled, load_pretrained, logits
from osdn_jax.interop.origin import Origin
from osdn_jax.interop.saving import save_pretrained
from osdn_jax.interop.surgery import replace_rule
from osdn_jax.interop.tokens import FolderTokenizer, end_tokens, tokenizer

__all__ = [
    "FAMILIES",
    "Family",
    "FolderTokenizer",
    "Inspection",
    "Origin",
    "assembled",
    "end_tokens",
    "inspect",
    "load_pretrained",
    "logits",
    "replace_rule",
    "save_pretrained",
    "tokenizer",
]
