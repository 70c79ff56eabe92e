"""The command line that evaluates a run."""

import json
import subprocess
import sys

import pytest

from osdn_jax import evaluate
from osdn_jax.data import load_tokenizer
from osdn_jax.evaluation.suites import LONGBENCH, SUITES, Positions
from osdn_jax.training import load_trained
from support import runs
from support.runs import finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def run():
    return finished()[0]


@pytest.fixture
def call(monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "__main__", evaluate)  # errors begin with the program's name

    def command(*arguments):
        try:
            status = evaluate.main([str(x) for x in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


def write_task(folder, text="the memory writes", task="words"):
    (folder / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    path = folder / f"{task}.yaml"
    path.write_text(TASK.format(data=folder / "data.jsonl").replace("task: words", f"task: {task}"))
    return path


def test_tasks_and_positions_of_a_run(run, call, tmp_path):
    pytest.importorskip("lm_eval")
    write_task(tmp_path)
    output, figure = tmp_path / "out.json", tmp_path / "out.png"
    files = ("--output", output, "--figure", figure)
    status, out, _ = call(
        "--workdir", run, "--tasks", "words", "--include_path", tmp_path, "--positions", "64,32", "--limit", 2, *files
    )
    assert status == 0
    record = json.loads(output.read_text())
    (result,) = record["results"]
    assert result["task"] == "words"
    assert result["n"] == 1
    assert f"{result['value']:.4f}" in out
    assert record["run"]["step"] == 40
    assert record["settings"]["long"] == "carried"
    assert record["environment"]["command"].startswith("python -m osdn_jax.evaluate --workdir")
    (buckets,) = record["positions"].values()
    assert [(x["start"], x["stop"], x["tokens"]) for x in buckets] == [(0, 32, 64), (32, 64, 64)]
    assert f"{buckets[0]['perplexity']:.4g}" in out
    assert figure.read_bytes().startswith(b"\x89PNG")

    # The same number from the model itself.
    trained = load_trained(run)
    tokens = load_tokenizer("bytes").encode("the memory writes", bos=True)
    nats = evaluate.TextModel(trained.apply, trained.parameters, trained.tokenizer, max_length=24)
    (score,) = nats.score_tokens([(tokens[:1].tolist(), tokens[1:].tolist())])
    assert result["value"] == pytest.approx(-score.log_likelihood / 17 / 0.6931471805599453, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --tasks, --suite or --positions"),
        (("--tasks", "a,,b"), "--tasks: got 'a,,b', expected names separated by commas"),
        (("--positions", "20480"), "--positions: got '20480', expected LENGTH,BUCKET"),
        (("--positions", "16,32"), "expected a bucket of at most the length"),
        (("--positions", "9999999,32"), "length: got 9999999, but the text has no window"),
        (("--positions", "64,32", "--text", "nothing.txt"), "nothing.txt"),
        (("--tasks", "a", "--figure", "a.png"), "--figure: got a file, but nothing by position to plot"),
        (("--tasks", "a", "--limit", "0"), "--limit: got '0', expected an integer of at least 1"),
        (("--suite", "none"), "--suite: invalid choice: 'none'"),
        (("--tasks", "a", "--data", "nowhere"), "--data: got 'nowhere', which is no directory"),
        (("--positions", "64,32", "--output", "a.txt"), "--output: got 'a.txt', expected a file that ends in .json"),
    ],
)
def test_a_wrong_line_is_an_error_of_one_line(run, call, arguments, message):
    status, out, err = call("--workdir", run, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_no_run_and_no_checkpoint(run, call, tmp_path):
    assert call("--workdir", tmp_path / "none", "--positions", "64,32")[0] == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((run / "config.json").read_bytes())
    status, _, err = call("--workdir", tmp_path / "run", "--positions", "64,32")
    assert status == 2
    assert "no folder of checkpoints" in err
    assert err.count("\n") == 1


def test_code_is_refused(run, call, tmp_path):
    pytest.importorskip("lm_eval")
    path = write_task(tmp_path, task="coded")
    path.write_text(f"{path.read_text()}process_results: !function evil.run\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    status, out, err = call("--workdir", run, "--tasks", "coded", "--include_path", tmp_path)
    assert (status, out) == (2, "")
    said = f"{path}: process_results: !function evil.run would run; --allow_code allows it"
    assert err == f"python -m osdn_jax.evaluate: error: {said}\n"


def test_without_the_extra_the_error_says_how_to_install_it(run):
    script = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('lm_eval', 'jinja2'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from osdn_jax import evaluate\n"
        f"sys.exit(evaluate.main(['--workdir', {str(run)!r}, '--tasks', 'a']))\n"
    )
    _, keywords = runs.command(None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=keywords["env"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'osdn-jax[eval]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_suite_names_what_it_could_not_run(run, call, tmp_path, monkeypatch):
    """Everything else of it is run; the status says that it is not whole."""
    positions = (Positions("pg19", "no-such-owner/no-such-data", "train", 64, 32, 2),)
    recall = ("completion_fda", "completion_fda_twice", "niah_single_1@900", "niah_single_1@99")
    suite = SUITES["osdn"]._replace(tasks=(), recall=recall, recall_limit=2, positions=positions)
    monkeypatch.setitem(SUITES, "osdn", suite)
    rows = [{"text": "City: Rome", "key": "city", "value": "Rome"}] * 3
    (tmp_path / "fda.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.json"
    status, out, _ = call("--workdir", run, "--suite", "osdn", "--data", tmp_path, "--output", output)
    assert status == 1
    record = json.loads(output.read_text())
    assert {x["task"]: x["n"] for x in record["results"]} == dict(zip(recall, (3, 3, 2), strict=False))
    assert list(record["missing"]) == ["niah_single_1@99", "pg19"]
    assert "not run: niah_single_1@99: length: got 99" in out
    assert suite.notes[0] in out


def test_a_task_that_fails_costs_no_other(run, call, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    write_task(tmp_path)
    text = write_task(tmp_path, task="again").read_text()
    (tmp_path / "again.yaml").write_text(text.replace("data.jsonl", "odd.jsonl"))
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "a\0b"}) + "\n")  # NUL starts documents of bytes
    suite = SUITES["osdn"]._replace(tasks=("again", "words"), recall=(), positions=())
    monkeypatch.setitem(SUITES, "osdn", suite)
    output = tmp_path / "out.json"
    arguments = ("--workdir", run, "--include_path", tmp_path, "--output", output)
    status, out, _ = call(*arguments, "--suite", "osdn")
    assert status == 1
    assert "not run: again: text must not hold the NUL character" in out
    record = json.loads(output.read_text())
    assert [x["task"] for x in record["results"]] == ["words"]
    assert record["lm_eval"]["versions"] == {"words": 1}
    status, _, err = call(*arguments, "--tasks", "again")
    assert status == 2
    said = "text must not hold the NUL character; found "
    assert err.splitlines()[-1].startswith(f"python -m osdn_jax.evaluate: error: {said}")


def test_suites_name_tasks_once():
    for suite in SUITES.values():
        names = [*suite.tasks, *suite.recall, *(x.name for x in suite.positions)]
        assert len(set(names)) == len(names)
        assert suite.notes
    assert len(LONGBENCH) == 14


def test_suites_name_tasks_of_lm_eval():
    """By the files of the installed library: reading all of them takes 20 seconds."""
    lm_eval = pytest.importorskip("lm_eval")
    from pathlib import Path

    folder = Path(lm_eval.__file__).parent / "tasks"
    files = [p for name in FOLDERS for p in (folder / name).rglob("*.yaml")]
    known = {line[6:].strip() for path in files for line in path.read_text().splitlines() if line.startswith("task: ")}
    assert {task for suite in SUITES.values() for task in suite.tasks} - known == set()


FOLDERS = (
    "piqa hellaswag winogrande arc super_glue wikitext lambada siqa triviaqa drop nq_open longbench sciq fda swde "
    "squad_completion"
).split()
