"""tmp."""
from typing import Any, NamedTuple
from osdn_jax.data.recall import Recall, mqar

class Task(NamedTuple):
    f: Any
    kw: dict
    def examples(self, count, length, seed):
        return mqar(count, length, seed=seed, **self.kw)

def parse_task(text):
    kw = dict(x.split("=") for x in text.partition(":")[2].split(","))
    kw.pop("length", None)
    return Task(None, {k: int(v) for k, v in kw.items()})
