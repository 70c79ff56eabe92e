"""Code in task files is found without running it."""

import pytest

yaml = pytest.importorskip("yaml")

from osdn_jax.evaluation.task_files import TaskFileError, code_in_file  # noqa: E402 (after the library is found)


def found(path):
    return [(code.file.name, code.key, code.code) for code in code_in_file(path)]


@pytest.mark.parametrize(
    ("text", "key", "code"),
    [
        ("task: a\nprocess_results: !function m.f\n", "process_results", "!function m.f"),
        ("task: a\nmetric_list:\n- metric: acc\n  aggregation: !function m.f\n", "metric_list[0].aggregation", None),
        ("task: a\nfewshot_config: {sampler: !<!function> m.f}\n", "fewshot_config.sampler", "!function m.f"),
        ("%TAG !f! !func\n---\ntask: a\nclass: !f!tion m.f\n", "class", "!function m.f"),
        ("task: a\nx: &x [!function m.f]\ny: *x\n", "x[0]", "!function m.f"),
        ("task: a\nx: !!python/object/apply:os.system [true]\n", "x", None),
        ("task: a\nx: !!python/name:os.system ''\n", "x", None),
        ("group: g\ntask:\n- task: a\n  doc_to_text: !function m.f\n", "task[0].doc_to_text", "!function m.f"),
        ("task: a\nmetric_list:\n- {metric: mine, hf_evaluate: true}\n", "metric_list[0].hf_evaluate", None),
        ("task: a\n? !function m.f\n: 1\n", "m.f", "!function m.f"),
    ],
)
def test_code_is_found_where_it_stands(tmp_path, text, key, code):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    (tmp_path / "m.py").write_text("raise SystemExit('it ran')\n")
    (first, *_) = found(path)
    assert first[:2] == ("a.yaml", key)
    assert code in (None, first[2])


def test_included_files_are_searched(tmp_path):
    (tmp_path / "a.yaml").write_text("include: more/b.yaml\ntask: a\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.yaml").write_text("include: [c.yaml, ../a.yaml]\n")  # in a circle
    (tmp_path / "more" / "c.yaml").write_text("doc_to_text: !function m.f\n")
    assert found(tmp_path / "a.yaml") == [("c.yaml", "doc_to_text", "!function m.f")]


def test_data_is_not_code(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "task: a\ntag: [b]\ndoc_to_text: '!function m.f'\nx: {y: 1, z: 2.5, w: null, v: true, d: 2020-01-01}\n"
        "metric_list:\n- {metric: acc, hf_evaluate: false}\n# process_results: !function m.f\n"
    )
    assert found(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "a.yaml is not YAML"),
        ("- task", "expected a mapping of keys"),
        ("", "expected a mapping of keys"),
        ("include: none.yaml\ntask: a\n", "none.yaml: No such file"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(TaskFileError, match=message) as caught:
        code_in_file(path)
    assert "\n" not in str(caught.value)
