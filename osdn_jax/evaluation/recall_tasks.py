"""Recall tasks that this package defines itself: S-NIAH, and FDA, SWDE and SQuAD as completions."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, cast

from osdn_jax.data import Tokenizer
from osdn_jax.data.recall import Prompt, contains, read_completions, s_niah
from osdn_jax.evaluation.hub import save_rows
from osdn_jax.evaluation.results import OURS, Result
from osdn_jax.evaluation.text_model import TextModel

NAMES = "niah_single_{1,2,3}@LENGTH or completion_{fda,swde,squad}[_twice][_osdn][@CONTEXT]"
_NEEDLE = re.compile(r"niah_single_([123])@(\d+)")
_COMPLETION = re.compile(r"completion_(fda|swde|squad)(_twice)?(_osdn)?(?:@(\d+))?")
_DATA = {"fda": "hazyresearch/based-fda", "swde": "hazyresearch/based-swde-v2", "squad": "hazyresearch/based-squad"}
_SAMPLES = 500  # of a needle, RULER's
_VERSION = "1"


class RecallTask(NamedTuple):
    """A recall task, read from its name.

    Attributes:
        name: its name.
        completion: "fda", "swde" or "squad"; None for S-NIAH.
        variant: of S-NIAH, 1 to 3.
        length: of S-NIAH, tokens of the prompt and the answer; of a completion, of the text and the answer, or None for
            the form's own number.
        reads: 1 or 2.
        form: of a completion, "jrt" or "osdn".
    """

    name: str
    completion: Literal["fda", "swde", "squad"] | None
    variant: int
    length: int | None
    reads: int
    form: Literal["jrt", "osdn"]


def parse_recall_task(name: str) -> RecallTask | None:
    """Return the recall task of a name, or None if it is not one of them.

    | name | task |
    | --- | --- |
    | niah_single_2@4096 | S-NIAH 2 with prompts of 4,096 tokens, the answer included; see `s_niah` |
    | completion_fda | FDA as a completion, in the form of "Just read twice"; see `read_completions` |
    | completion_fda_twice | the same with the text twice |
    | completion_fda_twice_osdn | the same in the form of the OSDN authors' evaluation |
    | completion_fda_twice@2000 | texts cut to 2,000 tokens, the answer included |

    Example:
        >>> parse_recall_task("completion_squad_twice_osdn").reads
        2
        >>> parse_recall_task("niah_single_1") is None  # a task of lm_eval
        True
    """
    if found := _NEEDLE.fullmatch(name):
        return RecallTask(name, None, int(found[1]), int(found[2]), 1, "jrt")
    if found := _COMPLETION.fullmatch(name):
        length = None if found[4] is None else int(found[4])
        return RecallTask(name, cast(Any, found[1]), 0, length, 2 if found[2] else 1, "osdn" if found[3] else "jrt")
    return None


def recall_prompts(
    task: RecallTask, tokenizer: Tokenizer, *, data: Path | None = None, limit: int | None = None
) -> list[Prompt]:
    """Return the prompts of a recall task.

    Args:
        task: as `parse_recall_task` returns it.
        tokenizer: the tokenizer of the run, which counts the tokens.
        data: a folder with fda.jsonl, swde.jsonl and squad.jsonl (or .gz, .xz of them) for completions; what is not
            there comes from the Hugging Face hub. Default: none.
        limit: prompts, at most. Default: 500 of S-NIAH, all of a completion.

    Raises:
        ConnectionError: the data of a completion are neither in the folder nor to be had.
        ValueError: as `s_niah` and `read_completions`.
    """
    if task.completion is None:
        return s_niah(task.variant, limit or _SAMPLES, task.length or 0, tokenizer=tokenizer)
    with TemporaryDirectory() as folder:
        files = [] if data is None else sorted(data.glob(f"{task.completion}.jsonl*"))
        path = files[0] if files else Path(folder, f"{task.completion}.jsonl")
        if not files:
            save_rows(_DATA[task.completion], "validation", path)
        prompts = read_completions(
            path, task.completion, reads=task.reads, context=task.length, tokenizer=tokenizer, form=task.form
        )
    return prompts[:limit]


def run_recall_task(
    model: TextModel,
    task: RecallTask,
    prompts: Sequence[Prompt],
    progress: Callable[[int], object] = lambda done: None,
) -> Result:
    """Return the share of prompts whose answer the model writes, and its standard error.

    Args:
        model: the model and how it reads texts.
        task: as `parse_recall_task` returns it.
        prompts: as `recall_prompts` returns them, at least one.
        progress: called with the number of prompts that are done since its last call.
    """
    requests = [(x.text, {"until": [x.stop] if x.stop else [], "max_gen_toks": x.new_tokens}) for x in prompts]
    outputs = model.generate(requests, progress)
    right = [contains(output, prompt.answer) for output, prompt in zip(outputs, prompts, strict=True)]
    share, count = sum(right) / len(right), len(right)
    error = (share * (1 - share) / (count - 1)) ** 0.5 if count > 1 else None
    return Result(task.name, "contains", share, error, count, _VERSION, OURS)
