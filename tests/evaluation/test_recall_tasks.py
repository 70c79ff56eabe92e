"""Recall tasks by name: their prompts, and the share of answers that a model writes."""

import json

import pytest

from osdn_jax.data import load_tokenizer
from osdn_jax.data.recall import read_completions, s_niah
from osdn_jax.evaluation import hub, recall_tasks
from osdn_jax.evaluation.recall_tasks import parse_recall_task, recall_prompts, run_recall_task
from osdn_jax.evaluation.suites import SUITES

TOKENIZER = load_tokenizer("bytes")
ROWS = [
    {"text": "Owner: K. Smith. City: Rome", "key": "city", "value": "Rome"},
    {"text": "Owner: K. Smith. City: Rome", "key": "owner", "value": "Smith"},
    {"text": "Owner: J. Jones. City: Oslo", "key": "city", "value": "Oslo"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "fda.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


class Model:
    """A model that writes given texts, and remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def generate(self, requests, progress):
        self.asked += requests
        progress(len(requests))
        return self.texts


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("niah_single_2@4096", (None, 2, 4096, 1, "jrt")),
        ("completion_fda", ("fda", 0, None, 1, "jrt")),
        ("completion_swde_twice", ("swde", 0, None, 2, "jrt")),
        ("completion_squad_twice_osdn@500", ("squad", 0, 500, 2, "osdn")),
    ],
)
def test_names(name, want):
    task = parse_recall_task(name)
    assert task == (name, *want)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_4@100", "fda", "completion_drop", "completion_fda@"])
def test_other_names_are_not_ours(name):
    assert parse_recall_task(name) is None


def test_every_recall_task_of_a_suite_has_a_name():
    assert all(parse_recall_task(name) for suite in SUITES.values() for name in suite.recall)


def test_prompts_are_those_of_the_tasks(folder):
    path = folder / "fda.jsonl"
    twice = recall_prompts(parse_recall_task("completion_fda_twice_osdn"), TOKENIZER, data=folder, limit=2)
    assert twice == read_completions(path, "fda", reads=2, form="osdn", tokenizer=TOKENIZER)[:2]
    short = recall_prompts(parse_recall_task("completion_fda@60"), TOKENIZER, data=folder)
    assert short == read_completions(path, "fda", context=60, tokenizer=TOKENIZER)
    needles = recall_prompts(parse_recall_task("niah_single_1@1024"), TOKENIZER, limit=3)
    assert needles == s_niah(1, 3, 1024, tokenizer=TOKENIZER)


def test_the_share_of_answers(folder):
    task = parse_recall_task("completion_fda")
    prompts = recall_prompts(task, TOKENIZER, data=folder)
    model, done = Model(" rome, of course", " Jones", "Oslo"), []
    result = run_recall_task(model, task, prompts, done.append)
    assert (result.task, result.metric, result.n, result.source) == ("completion_fda", "contains", 3, "osdn_jax")
    assert result.value == pytest.approx(2 / 3)
    assert result.stderr == pytest.approx((2 / 9 / 2) ** 0.5)
    assert model.asked[0] == (prompts[0].text, {"until": ["\n"], "max_gen_toks": 48})
    assert done == [3]
    needle = recall_prompts(parse_recall_task("niah_single_1@1024"), TOKENIZER, limit=1)
    model = Model(needle[0].answer)
    assert run_recall_task(model, parse_recall_task("niah_single_1@1024"), needle)[2:4] == (1.0, None)
    assert model.asked == [(needle[0].text, {"until": [], "max_gen_toks": 128})]


def test_data_of_the_hub(monkeypatch, tmp_path):
    def save(data, split, path):
        assert (data, split) == ("hazyresearch/based-fda", "validation")
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    monkeypatch.setattr(recall_tasks, "save_rows", save)
    assert len(recall_prompts(parse_recall_task("completion_fda"), TOKENIZER, data=tmp_path)) == 3


def test_without_the_data_the_error_says_how_to_get_them(monkeypatch, tmp_path):
    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach the Hub")

    library = type("datasets", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setattr(hub, "require", lambda *_: library)
    with pytest.raises(ConnectionError, match="hf download --repo-type dataset hazyresearch/based-swde-v2"):
        recall_prompts(parse_recall_task("completion_swde"), TOKENIZER, data=tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_network_the_libraries_work_offline_at_once(monkeypatch, known):
    def getaddrinfo(host, port):
        assert host == "hub.example"
        if not known:
            raise OSError("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub.socket, "getaddrinfo", getaddrinfo)
    hub.prepare_environment()
    assert hub.os.environ.get("HF_HUB_OFFLINE") == (None if known else "1")
