"""The form of a family: how models of one kind are described in config.json, and how their tensors are named."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from osdn_jax.interop.mapping import Row
from osdn_jax.nn import ModelConfig

Describe = Callable[[Mapping[str, Any]], ModelConfig]
Rows = Callable[[ModelConfig, Mapping[str, Any], Collection[str]], Sequence[Row]]
Express = Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that one library saves in one way.

    Args:
        name: the name that `save_pretrained(layout=…)` takes, which is also the first model_type.
        library: who reads and writes them, for messages.
        describe: function from the entries of config.json to the configuration of our model. It raises ValueError for
            every entry that it does not know or cannot serve; see `Options`.
        rows: function from our configuration, the entries of config.json and the names of the tensors in the files to
            the rows that cover all parameters.
        model_types: values of model_type in config.json. Default: the name.
        express: function from a configuration to the entries of a config.json that describes it, for models that were
            never in this layout. It raises ValueError naming what the layout cannot hold. Default: None, not possible.
        left_out: {regular expression of the names of tensors: the part of the model} of what is not loaded.
    """

    name: str
    library: str
    describe: Describe
    rows: Rows
    model_types: tuple[str, ...] = ()
    express: Express | None = None
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def types(self) -> tuple[str, ...]:
        """The values of model_type in config.json."""
        return self.model_types or (self.name,)
