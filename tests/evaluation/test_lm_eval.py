"""Tasks of lm-evaluation-harness on a small model, offline: one of each kind, against the model's own scores."""

import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from osdn_jax.data import load_tokenizer  # noqa: E402 (after the library is found)
from osdn_jax.evaluation import TextModel, harness  # noqa: E402
from osdn_jax.evaluation.lm_eval_adaptor import LmEvalModel  # noqa: E402
from osdn_jax.evaluation.text_model import rolling_windows  # noqa: E402
from support.text import byte_model, continued, log_likelihoods  # noqa: E402

DOCUMENTS = [
    {"text": "the memory writes what key", "start": "the memory", "choices": ["writes", "reads it all"], "label": 0},
    {"text": "queries read it back again", "start": "queries", "choices": ["sleep", "read it"], "label": 1},
    {"text": "recall under decay", "start": "recall", "choices": ["is", "under decay", "0"], "label": 1},
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}}}
validation_split: validation
metadata: {{version: 3}}
"""
KINDS = {
    "likelihood": """
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: "{{choices[label]}}"
metric_list:
- {metric: perplexity, aggregation: perplexity, higher_is_better: false}
- {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of each kind; the answers of "generation" are the model's own for the first two documents."""
    path = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, document in enumerate(DOCUMENTS):
        answer = decoded(continued(tokens_of(document["start"]), 8)).split("\n")[0]
        rows.append(document | {"answer": answer if number < 2 else f"{answer}?"})
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in KINDS.items():
        (path / f"{name}.yaml").write_text(COMMON.format(name=name, data=path / "data.jsonl") + text)
    (path / "code.yaml").write_text("include: choice.yaml\ntask: code\nprocess_docs: !function evil.run\n")
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\ndef run(docs): return docs\n")
    text = (path / "choice.yaml").read_text()
    (path / "lacking.yaml").write_text(text.replace("task: choice", "task: lacking").replace("{{start}}", "{{begin}}"))
    (path / "script.yaml").write_text(text.replace("task: choice", "task: script").replace("acc,", "./evil,"))
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (path / "reach.yaml").write_text(text.replace("task: choice", "task: reach").replace("{{start}}", template))
    (path / "several.yaml").write_text("group: several\ntask: [choice, code]\n")
    (path / "all.yaml").write_text("group: all_kinds\ntask: [choice, likelihood]\n")
    (path / "broken.yaml").write_text("task: [\n")
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Set what `prepare_environment` would set, to be restored after the test."""
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")


def tokens_of(text):
    return [0, *text.encode()]


def decoded(tokens):
    return load_tokenizer("bytes").decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)


def adapted(**options):
    return LmEvalModel(TextModel(*byte_model(), load_tokenizer("bytes"), **{"max_length": 16} | options))


def run(folder, names, model=None, **options):
    found = harness.find_tasks(names, include_path=[folder], allow_code=options.pop("allow_code", False))
    tasks, failed = harness.load_tasks(found)
    assert failed == {}
    results, about = harness.run_tasks(model or adapted(), tasks, found, **options)
    return {(x.task, x.metric): x for x in results}, about


def likelihood(start, end):
    """The log-likelihood of end after start, and whether the model would say it."""
    tokens = [*tokens_of(start), *end.encode()]
    values, greedy = log_likelihoods(tokens)
    return values[-len(end.encode()) :].sum(), greedy[-len(end.encode()) :].all()


def test_one_task_of_each_kind(folder):
    model = adapted()
    cached = []
    model.cache_hook.add_partial = lambda *arguments: cached.append(arguments)
    results, about = run(folder, list(KINDS), model)
    scores = [[likelihood(x["start"], f" {choice}")[0] for choice in x["choices"]] for x in DOCUMENTS]

    direct = [likelihood(x["start"], x["choices"][x["label"]]) for x in DOCUMENTS]
    perplexity = math.exp(-sum(value for value, _ in direct) / 3)
    assert results["likelihood", "perplexity"].value == pytest.approx(perplexity, rel=1e-3)
    assert results["likelihood", "acc"].value == sum(greedy for _, greedy in direct) / 3

    lengths = [[len(choice) for choice in x["choices"]] for x in DOCUMENTS]
    normed = [np.array(row) / length for row, length in zip(scores, lengths, strict=True)]
    for metric, values in (("acc", scores), ("acc_norm", normed)):
        right = sum(np.argmax(row) == x["label"] for row, x in zip(values, DOCUMENTS, strict=True))
        assert results["choice", metric].value == right / 3

    total = sum(log_likelihoods(tokens_of(x["text"]))[0].sum() for x in DOCUMENTS)
    count = sum(len(x["text"].encode()) for x in DOCUMENTS)
    assert results["rolling", "bits_per_byte"].value == pytest.approx(-total / count / math.log(2), rel=1e-4)

    assert results["generation", "exact_match"].value == pytest.approx(2 / 3)
    assert {x.n for x in results.values()} == {3}
    assert {x.version for x in results.values()} == {"3"}
    assert {x.source for x in results.values()} == {str(folder / f"{name}.yaml") for name in KINDS}
    assert about["options"]["limit"] is None
    # What lm_eval's cache of responses is filled with, by the names of its requests.
    kinds = [name for name, _, _ in cached]
    assert {name: kinds.count(name) for name in kinds} == {
        "loglikelihood": 10,
        "loglikelihood_rolling": 3,
        "generate_until": 3,
    }


def test_windows_are_those_of_lm_eval(folder):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (0, 1, 15, 16, 17, 32, 40):
        tokens = list(range(1, count + 1))
        theirs = get_rolling_token_windows(token_list=tokens, prefix_token=0, max_seq_len=16, context_len=1)
        assert list(rolling_windows(tokens, 0, 16)) == list(map(make_disjoint_window, theirs))
    results, _ = run(folder, ["rolling"], adapted(long="windows"), limit=1)
    tokens = tokens_of(DOCUMENTS[0]["text"])
    assert len(tokens) == 27
    total = log_likelihoods(tokens[:17])[0].sum() + log_likelihoods(tokens[10:])[0][-10:].sum()
    assert results["rolling", "bits_per_byte"].value == pytest.approx(-total / 26 / math.log(2), rel=1e-4)
    assert results["rolling", "bits_per_byte"].n == 1


def test_groups(folder):
    results, _ = run(folder, ["all_kinds"], limit=1)
    assert {task for task, _ in results} >= {"choice", "likelihood"}


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (["code"], "code.yaml: process_docs: !function evil.run"),
        (["several"], "code.yaml: process_docs: !function evil.run"),
        (["script"], "script.yaml: metric_list[0].metric: ./evil, a script"),
    ],
)
def test_code_is_refused_before_it_is_imported(folder, names, place):
    with pytest.raises(harness.TaskError) as caught:
        harness.find_tasks(names, include_path=[folder])
    message = str(caught.value)
    assert place in message
    assert message.endswith("--allow_code allows it")
    assert "\n" not in message
    assert not (folder / "ran").exists()


def test_code_runs_if_it_is_allowed(folder):
    results, _ = run(folder, ["code"], allow_code=True, limit=1)
    assert results["code", "acc"].n == 1
    assert (folder / "ran").exists()
    (folder / "ran").unlink()


def test_a_file_is_a_task_too(folder):
    with pytest.raises(harness.TaskError, match="code.yaml: process_docs: !function"):
        harness.find_tasks([str(folder / "code.yaml")])
    results, _ = run(folder, [str(folder / "choice.yaml")], limit=1)
    assert results["choice", "acc"].n == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lacking", "^its data lacks a field that .*lacking.yaml names: 'begin' is undefined; its fields"),
        ("reach", "^a template of .*reach.yaml reaches into Python"),
    ],
)
def test_what_cannot_be_loaded_says_why(folder, name, message):
    tasks, failed = harness.load_tasks(harness.find_tasks([name], include_path=[folder]))
    assert tasks == []
    assert list(failed) == [name]
    assert re.search(message, failed[name])
    assert "\n" not in failed[name]


def test_an_unknown_task_is_named(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", _local_only(TaskManager.__init__))
    with pytest.raises(harness.TaskError, match="no task 'choise' in lm_eval or in .*did you mean choice.*broken.yaml"):
        harness.find_tasks(["choise"], include_path=[folder])
    with pytest.raises(harness.TaskError, match="--include_path: got '/nowhere', which is no directory"):
        harness.find_tasks(["choice"], include_path=["/nowhere"])


def test_data_of_the_hub_say_how_to_get_them(tmp_path):
    text = "task: far\ndataset_path: someone/some_data\noutput_type: generate_until\ntest_split: test\n"
    (tmp_path / "far.yaml").write_text(f"{text}doc_to_text: a\ndoc_to_target: b\n")
    tasks, failed = harness.load_tasks(harness.find_tasks(["far"], include_path=[tmp_path]))
    assert tasks == []
    assert "the data set someone/some_data is not in the cache here" in failed["far"]
    assert "hf download --repo-type dataset someone/some_data" in failed["far"]


def _local_only(init):
    """Leave out lm_eval's own 15,000 files, which take 20 seconds to read."""

    def local(self, *arguments, include_defaults=True, **options):
        init(self, *arguments, include_defaults=False, **options)

    return local
