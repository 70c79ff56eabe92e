"""The papers' own lists of evaluation tasks, with their settings, and what of them is not known."""

from typing import NamedTuple

LONGBENCH = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum "
    "passage_count passage_retrieval_en"
).split()


class Positions(NamedTuple):
    """Perplexity by position of a data set.

    Attributes:
        name: the name of the file or folder in the folder of local data.
        data: the data set on the Hugging Face hub.
        split: its split.
        length: tokens of a window.
        bucket: positions in a bucket.
        windows: number of windows.
    """

    name: str
    data: str
    split: str
    length: int
    bucket: int
    windows: int


class Suite(NamedTuple):
    """Evaluation of a paper.

    Attributes:
        paper: title and identifier.
        source: where the list is from.
        tasks: tasks of lm_eval.
        recall: recall tasks of this package; see `parse_recall_task`.
        recall_limit: documents of each S-NIAH task.
        positions: perplexity by position.
        notes: how this differs from what the authors ran, and what is not known.
    """

    paper: str
    source: str
    tasks: tuple[str, ...]
    recall: tuple[str, ...]
    recall_limit: int
    positions: tuple[Positions, ...]
    notes: tuple[str, ...]


def _needles(lengths: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"niah_single_{number}@{length}" for number in (1, 2, 3) for length in lengths)


_COMMON = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "wikitext", "lambada_openai")


def _completions(form: str) -> tuple[str, ...]:
    return tuple(f"completion_{name}{reads}{form}" for name in ("fda", "swde", "squad") for reads in ("", "_twice"))


SUITES = {
    "osdn": Suite(
        paper="Online Scaled DeltaNet, arXiv 2605.13473",
        source="the evaluation scripts of its code, Lhongpei/OSLA: experiments/osla_340M/scripts",
        tasks=(*_COMMON, "social_iqa", "triviaqa", "drop", "nq_open", *(f"longbench_{name}" for name in LONGBENCH)),
        recall=_completions("_osdn") + _completions("@2000") + _needles((2048, 4096, 8192)),
        recall_limit=50,
        positions=(Positions("pg19", "fla-hub/pg19", "train", 20_480, 2_048, 128),),
        notes=(
            "FDA, SWDE and SQuAD come in the authors' form (_osdn), whose prompt of SQuAD twice rewards ending the "
            "line instead of copying, and in that of the JRT paper with the same 2,000 tokens.",
            "S-NIAH is RULER's with a haystack that fills the length; the authors' is lm_eval's, whose haystack grows "
            "in steps of 500 words.",
            "triviaqa, drop and nq_open are closed-book or few-shot tasks of lm_eval, with exact match.",
            "The number of PG19 windows of the paper is not known; 128 here.",
        ),
    ),
    "pdn": Suite(
        paper="Preconditioned DeltaNet, arXiv 2604.21100",
        source="the paper and indexes of it; its code has no evaluation",
        tasks=(*_COMMON, "sciq", "fda", "swde", "squad_completion", "triviaqa", "drop", "nq_open"),
        recall=_needles((512, 1024, 2048, 4096, 8192)),
        recall_limit=500,
        positions=(),
        notes=(
            "The paper's mean of in-context retrieval has FDA (lm_eval, zero-shot) in it; that its other tasks are "
            "swde, squad_completion, triviaqa, drop and nq_open, as in the papers that it compares itself with, is "
            "not confirmed.",
            "Prompts, number of S-NIAH samples (500 here, RULER's) and the handling of long texts are not known.",
        ),
    ),
}
"""The suites by name."""
