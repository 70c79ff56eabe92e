"""FDA, SWDE and SQuAD as completions, read once and twice, from local JSONL files."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from osdn_jax.data.byte_tokenizer import ByteTokenizer
from osdn_jax.data.documents import checked_field, jsonl_lines, missing_field
from osdn_jax.data.recall.arguments import checked_bool, checked_int
from osdn_jax.data.recall.prompts import Prompt
from osdn_jax.data.tokenizers import Tokenizer

type Row = Mapping[str, str]
type Cut = Callable[[str, str], str]  # (text, answer) -> the part of the text around the answer

_SWDE_QUESTION = "Summary of information above..."
_NEW_TOKENS, _STOP = 48, "\n"
_OSDN_MARGIN = 64  # tokens beyond the context at which the OSDN authors' prompts are cut off
_CONTEXT = {"jrt": 1000, "osdn": 2000}


def read_completions(
    path: str | os.PathLike[str],
    task: Literal["fda", "swde", "squad"],
    *,
    reads: int = 1,
    context: int | None = None,
    cut: bool = True,
    answer_tokens: int = 50,
    tokenizer: Tokenizer | None = None,
    form: Literal["jrt", "osdn"] = "jrt",
) -> list[Prompt]:
    r"""Return the prompts of FDA, SWDE or SQuAD completion, with the text once or twice, from a JSONL file.

    A row has text, key and value for FDA and SWDE (the data sets hazyresearch/based-fda and based-swde-v2), text and
    value for SQuAD (based-squad), whose text ends before the answer; SQuAD read twice also needs context and question.
    The model may write 48 tokens, up to a line break; `contains_accuracy` is the metric. Answers of fewer than two
    characters are left out.

    Form "jrt", of "Just read twice":

    | task | once | twice |
    | --- | --- | --- |
    | fda, swde | {text}. {Key}: | Information about {Key}. {text}.⏎{text}. {Key}: |
    | squad | {text} | {question} {context up to "Question:"}⏎{text} |

    A "{key}:" at the end of the text is removed first, and from SWDE's all that follows "Summary of information
    above...". Every text, and SQuAD's context, is cut *before* it is doubled: to context - answer_tokens tokens around
    the first place where the value occurs in it, half of them before; if it does not occur, to its end.

    Form "osdn", the evaluation of the OSDN authors, differs in its "twice": SWDE and SQuAD are {text}⏎{text}, doubled
    before they are cut, so that long texts are not repeated and SQuAD's first copy ends with a line break at the place
    where the answer would come. Only FDA has an introduction. Every prompt is cut off after context + 64 tokens, also
    if that cuts off the question (FDA read twice).

    Args:
        path: a .jsonl file, also .gz or .xz.
        task: "fda", "swde" or "squad".
        reads: 1 or 2.
        context: tokens of the text and the answer. Default: 1,000 for form "jrt" (Table 1 of the paper), 2,000 for
            "osdn".
        cut: whether long texts are cut. lm-eval's own tasks fda, swde and squad_completion do not cut.
        answer_tokens: tokens of the context that are left for the answer.
        tokenizer: counts the tokens. Default: bytes.
        form: "jrt" or "osdn".

    Returns:
        The prompts, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument is of another type.
        ValueError: an argument is out of range; a line is no JSON object, lacks a field or has an empty key (the
            message has its number); or the file has no prompt.

    Source:
        Arora et al., "Just read twice" (https://arxiv.org/abs/2407.05483), and its code,
        https://github.com/HazyResearch/prefix-linear-attention, lm-eval-harness/lm_eval/tasks/based_*. Form "osdn":
        https://github.com/Lhongpei/OSLA, experiments/osla_340M/scripts/eval_jrt.py.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "fda.jsonl")
        >>> row = {"text": "Owner: K. Smith. City: Rome", "key": "city", "value": "Rome"}
        >>> _ = path.write_text(json.dumps(row))
        >>> read_completions(path, "fda", reads=2)[0].text
        'Information about City. Owner: K. Smith. City: Rome.\nOwner: K. Smith. City: Rome. City:'
    """
    settings = _settings(task, reads, context, cut, answer_tokens, tokenizer, form)
    prompts = [
        Prompt(settings.prompt(row), row["value"], _NEW_TOKENS, _STOP)
        for row in _rows(Path(path), _fields(task, reads if form == "jrt" else 1))
        if len(row["value"]) > 1
    ]
    if not prompts:
        raise ValueError(f"{os.fspath(path)} has no row with a value of at least two characters")
    return prompts


def _fields(task: str, reads: int) -> tuple[str, ...]:
    if task != "squad":
        return ("text", "key", "value")
    return ("text", "value", "context", "question") if reads == 2 else ("text", "value")


def _rows(file: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    """Yield the fields of every row. Raises ValueError, with the number of the line."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}; expected a .jsonl file")
    for number, line in jsonl_lines(file):
        place = f"{file}, line {number}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: malformed JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: got {type(row).__name__}, expected a JSON object with {', '.join(fields)}")
        for field in fields:
            if field not in row:
                raise missing_field(place, field, list(row), "row")
        yield {field: _text(place, row[field], field) for field in fields}


def _text(place: str, value: Any, field: str) -> str:
    text = checked_field(place, value, field).decode()
    if field == "key" and not text:
        raise ValueError(f"{place}: field 'key' is empty, expected what is asked for")
    return text


@dataclasses.dataclass(frozen=True)
class _Settings:
    task: str
    reads: int
    context: int | None  # None: nothing is cut
    answer_tokens: int
    tokenizer: Tokenizer
    form: str

    def prompt(self, row: Row) -> str:
        """Return the prompt of a row."""
        write = _jrt if self.form == "jrt" else _osdn
        text = write(self.task, self.reads, row, self.cut)
        if self.form == "jrt" or self.context is None:
            return text
        ids = self.tokenizer.encode(text)
        most = self.context + _OSDN_MARGIN
        return text if len(ids) <= most else self.tokenizer.decode(ids[:most])

    def cut(self, text: str, answer: str) -> str:
        """Return the tokens of a text around the first place of the answer, half of them before it."""
        if self.context is None:
            return text
        most, ids = self.context - self.answer_tokens, self.tokenizer.encode(text)
        if len(ids) <= most:
            return text
        found = re.search(re.escape(answer), text, re.IGNORECASE)
        if found is None:
            return self.tokenizer.decode(ids[-most:])
        at = len(self.tokenizer.encode(text[: found.start()]))
        start = max(0, at - most // 2)
        return self.tokenizer.decode(ids[start : start + most])


def _settings(
    task: Any, reads: Any, context: Any, cut: Any, answer_tokens: Any, tokenizer: Tokenizer | None, form: Any
) -> _Settings:
    for name, value, known in (("task", task, ("fda", "swde", "squad")), ("form", form, tuple(_CONTEXT))):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    if checked_int("reads", reads, 1) > 2:
        raise ValueError(f"reads: got {reads}, expected 1 or 2")
    answer_tokens = checked_int("answer_tokens", answer_tokens, 0)
    context = checked_int("context", _CONTEXT[form] if context is None else context, 1)
    if context <= answer_tokens:
        raise ValueError(f"context: got {context}, expected more than answer_tokens = {answer_tokens}")
    if not checked_bool("cut", cut):
        context = None
    return _Settings(task, reads, context, answer_tokens, ByteTokenizer() if tokenizer is None else tokenizer, form)


def _jrt(task: str, reads: int, row: Row, cut: Cut) -> str:
    """Return a prompt in the form of "Just read twice"."""
    answer = row["value"]
    if task == "squad":
        text = cut(row["text"], answer).strip()
        if reads == 1:
            return text
        context = cut(row["context"].split("Question:")[0], answer)
        return f"{row['question']} {context}\n{text}"
    text = row["text"].split(_SWDE_QUESTION)[0] if task == "swde" else row["text"]
    text, asked = cut(text, answer), f"{row['key']}:"
    while text.lower().endswith(asked.lower()):
        text = text[: -len(asked)]
    text = text.strip().strip(".") if task == "swde" else text.strip("\n").strip(".")
    return _asked(text, row["key"], reads)


def _osdn(task: str, reads: int, row: Row, cut: Cut) -> str:
    """Return a prompt in the form of the OSDN authors' evaluation."""
    text = row["text"]
    if reads == 2 and task != "fda":
        text = f"{text}\n{text}"
    text = cut(text, row["value"])
    if task == "squad":
        return text
    return _asked(text.strip("\n").strip("."), row["key"], reads if task == "fda" else 1)


def _asked(text: str, key: str, reads: int) -> str:
    """Return the text, once or twice, and what is asked for."""
    text, key = f"{text}.", key[0].upper() + key[1:]
    if reads == 1:
        return f"{text} {key}:"
    return f"Information about {key.strip(':')}. {text}\n{text} {key}:"
