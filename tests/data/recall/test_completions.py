"""FDA, SWDE and SQuAD completion from local files, against the prompts of the papers' code."""

import gzip
import json

import pytest

from osdn_jax.data import ByteTokenizer, load_tokenizer
from osdn_jax.data.recall import contains_accuracy, read_completions

FDA = {"text": "Device: X-1.\nApplicant: Acme Ltd.\napplicant:", "key": "applicant", "value": "Acme Ltd"}
SWDE = {
    "text": "The film Tin Men opened in 1987.\n\nSummary of information above... year:",
    "key": "year",
    "value": "1987",
}
SQUAD = {
    "text": " Bern is old. It lies on the Aare.\nThe river of Bern is the",
    "value": "Aare",
    "context": "Bern is old. It lies on the Aare.Question: Which river?",
    "question": "On which river does Bern lie?",
}


def read(folder, rows, task, **options):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return read_completions(path, task, **options)


@pytest.mark.parametrize(
    ("task", "row", "reads", "text"),
    [
        ("fda", FDA, 1, "Device: X-1.\nApplicant: Acme Ltd. Applicant:"),
        (
            "fda",
            FDA,
            2,
            "Information about Applicant. Device: X-1.\nApplicant: Acme Ltd.\n"
            "Device: X-1.\nApplicant: Acme Ltd. Applicant:",
        ),
        ("swde", SWDE, 1, "The film Tin Men opened in 1987. Year:"),
        (
            "swde",
            SWDE,
            2,
            "Information about Year. The film Tin Men opened in 1987.\nThe film Tin Men opened in 1987. Year:",
        ),
        ("squad", SQUAD, 1, "Bern is old. It lies on the Aare.\nThe river of Bern is the"),
        (
            "squad",
            SQUAD,
            2,
            "On which river does Bern lie? Bern is old. It lies on the Aare.\n"
            "Bern is old. It lies on the Aare.\nThe river of Bern is the",
        ),
    ],
)
def test_prompts_read_once_and_twice(tmp_path, task, row, reads, text):
    (prompt,) = read(tmp_path, [row], task, reads=reads)
    assert prompt == (text, row["value"], 48, "\n")


def test_the_osdn_authors_form(tmp_path):
    text = SQUAD["text"]
    (prompt,) = read(tmp_path, [SQUAD], "squad", reads=2, form="osdn")
    assert prompt.text == f"{text}\n{text}"
    (prompt,) = read(tmp_path, [SQUAD], "squad", form="osdn")
    assert prompt.text == text
    # A model that copies well continues the second copy like the first, with a line break, and scores 0.
    copied = prompt.text.partition(text)[2] + "\n" + text
    assert contains_accuracy([prompt], [copied]) == 0
    page = {"text": "a. " * 300 + "Height: 12 m. " + "b. " * 300, "key": "height", "value": "12 m"}
    (prompt,) = read(tmp_path, [page], "swde", reads=2, form="osdn", context=150)
    assert prompt.text.count("Height: 12 m.") == 1  # doubled before it is cut
    (prompt,) = read(tmp_path, [page], "fda", reads=2, form="osdn", context=450)
    assert len(prompt.text) == 450 + 64  # and here the question is cut off
    assert not prompt.text.endswith("Height:")
    (prompt,) = read(tmp_path, [page], "swde", reads=2, context=150)
    assert prompt.text.count("Height: 12 m.") == 2  # cut before it is doubled
    assert prompt.text.endswith("Height:")


@pytest.mark.parametrize("task", ["fda", "swde"])
def test_long_texts_are_cut_around_the_first_answer(tmp_path, task):
    text = "".join(f"w{i:04d}" for i in range(1000))
    row = {"text": text, "key": "number", "value": "w0500"}
    at = text.index("w0500")
    for context, answer_tokens in ((400, 50), (101, 100)):
        (prompt,) = read(tmp_path, [row], task, context=context, answer_tokens=answer_tokens)
        size = context - answer_tokens
        start = at - size // 2
        assert prompt.text == text[start : start + size] + ". Number:"
    (prompt,) = read(tmp_path, [row | {"value": "nowhere"}], task, context=400)
    assert prompt.text == text[-350:] + ". Number:"
    (prompt,) = read(tmp_path, [row | {"value": "w0001"}], task, context=400)
    assert prompt.text == text[:350] + ". Number:"
    (prompt,) = read(tmp_path, [row], task, cut=False)
    assert prompt.text == text + ". Number:"
    (prompt,) = read(tmp_path, [row], task)
    assert len(prompt.text) == 950 + len(". Number:")


def test_case_is_ignored_where_the_answer_is_looked_for(tmp_path):
    row = {"text": "x" * 500 + "ROME" + "y" * 500, "key": "city", "value": "Rome"}
    (prompt,) = read(tmp_path, [row], "fda", context=100)
    assert prompt.text == "x" * 25 + "ROME" + "y" * 21 + ". City:"


def test_tokens_are_counted_by_the_tokenizer(tmp_path, corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    row = {"text": "the memory writes what the key recalls " * 100 + "42", "key": "answer", "value": "42"}
    (prompt,) = read(tmp_path, [row], "fda", context=120, tokenizer=tokenizer)
    kept = prompt.text.removesuffix(". Answer:")
    assert kept.endswith("recalls 42")
    assert 30 < len(tokenizer.encode(kept)) <= 70
    assert len(ByteTokenizer().encode(kept)) > 70


def test_answers_of_one_character_are_left_out(tmp_path):
    rows = [FDA, FDA | {"value": "A"}, FDA | {"value": ""}, FDA | {"value": "X-1"}]
    assert [prompt.answer for prompt in read(tmp_path, rows, "fda")] == ["Acme Ltd", "X-1"]
    with pytest.raises(ValueError, match=r"rows.jsonl has no row with a value of at least two characters$"):
        read(tmp_path, rows[1:3], "fda")


def test_the_oracle_and_the_metric(tmp_path):
    prompts = read(tmp_path, [FDA, FDA | {"value": "x-1"}], "fda", reads=2)
    assert contains_accuracy(prompts, [" ACME LTD.", " Device X-1"]) == 1
    assert contains_accuracy(prompts, ["\nAcme Ltd", " X1"]) == 0


def test_compressed_files_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(f"\n{json.dumps(FDA)}\n\n{json.dumps(FDA)}\n".encode()))
    assert len(read_completions(path, "fda")) == 2


@pytest.mark.parametrize(
    ("lines", "task", "options", "message"),
    [
        ([FDA, {"text": "x", "key": "y"}], "fda", {}, "line 2: no field 'value'; the row has 'text', 'key'"),
        ([SQUAD, {"text": "x", "value": "yy"}], "squad", {"reads": 2}, "line 2: no field 'context'; the row has .*"),
        ([FDA, FDA | {"value": 3}], "fda", {}, "line 2: field 'value' must be a string; got a number"),
        ([FDA | {"key": ""}], "swde", {}, "line 1: field 'key' is empty, expected what is asked for"),
        ([["x"]], "fda", {}, "line 1: got list, expected a JSON object with text, key, value"),
    ],
)
def test_mistakes_name_the_line(tmp_path, lines, task, options, message):
    with pytest.raises(ValueError, match=f"^{tmp_path}/rows.jsonl, {message}$"):
        read(tmp_path, lines, task, **options)


def test_other_mistakes_end_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=f"^no such file: {path}; expected a .jsonl file$"):
        read_completions(path, "fda")
    path.write_text(json.dumps(FDA) + "\n{")
    with pytest.raises(ValueError, match=f"^{path}, line 2: malformed JSON: [^\n]*$"):
        read_completions(path, "fda")
    for options, message in (
        ({"task": "drop"}, "task: got 'drop', expected one of fda, swde, squad"),
        ({"form": "x"}, "form: got 'x', expected one of jrt, osdn"),
        ({"reads": 3}, "reads: got 3, expected 1 or 2"),
        ({"context": 50}, "context: got 50, expected more than answer_tokens = 50"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            read_completions(path, **({"task": "fda"} | options))
