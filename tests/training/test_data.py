"""`config.data`: every type of text and tokenizer, end to end, and refused ones."""

import math

import numpy as np
import pytest

from osdn_jax.data import (
    Mixture,
    PackedWindows,
    StreamedWindows,
    TokenizedDocuments,
    TokenWindows,
    load_tokenizer,
    shakespeare,
    training_batches,
)
from osdn_jax.data.prepare import prepare
from osdn_jax.generate import generate
from osdn_jax.nn.split import split_model
from osdn_jax.sampling import sample
from osdn_jax.training import (
    ConfigError,
    build_corpus,
    build_data,
    build_model,
    build_model_config,
    build_tokenizer,
    load_parameters,
    read_metrics,
    train,
)
from support.corpora import write_jsonl, write_parquet, write_sentencepiece, write_tokenizer
from support.models import reference_logits
from support.runs import rows, tiny_config, write_text

LINES = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder / "tokenizer.json")
    write_sentencepiece(folder / "spm.model")
    lines = write_text(folder / "lines.txt", words=12 * LINES).read_text().splitlines()
    write_jsonl(folder / "rows.jsonl", lines)
    write_parquet(folder / "rows.parquet", lines)
    (folder / "set").mkdir()
    write_parquet(folder / "set" / "train.parquet", lines)
    prepare(folder / "rows.jsonl", folder / "prepared", tokenizer=folder / "tokenizer.json", shard_bytes=1500)
    return folder


def config_of(corpus, data="rows.jsonl", tokenizer="tokenizer.json", **changes):
    path = data if data.startswith("hf:") or not data else str(corpus / data)
    return tiny_config(
        path, data__tokenizer="bytes" if tokenizer == "bytes" else str(corpus / tokenizer), **changes
    )  # fmt: skip


# Windows


def test_bytes_stay_as_they_were():
    data = build_data(tiny_config(""))
    assert isinstance(data.train, PackedWindows)
    assert (data.tokens_per_byte, data.held_out_tokens_per_byte) == (1.0, 1.0)
    np.testing.assert_equal(data.train[3], PackedWindows(shakespeare("train"), 24)[3])
    np.testing.assert_equal(data.held_out[3], PackedWindows(shakespeare("validation"), 48)[3])
    assert data.summary == "4.54 MB of text to train on, 0.51 MB held out"


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "spm.model"])
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_text_is_split_and_tokenised(corpus, kind, tokenizer):
    config = config_of(corpus, kind, tokenizer)
    data = build_data(config)
    parts = [TokenizedDocuments(part, load_tokenizer(corpus / tokenizer)) for part in build_corpus(config)]
    for got, part, length in zip((data.train, data.held_out), parts, (24, 48), strict=True):
        for a, b in zip(got, TokenWindows(part, length), strict=True):
            np.testing.assert_equal(a, b)
    assert data.tokens_per_byte == parts[0].text_tokens / parts[0].text_bytes
    assert data.held_out_tokens_per_byte == parts[1].text_tokens / parts[1].text_bytes < 1


def test_prepared_data_has_its_last_documents_held_out(corpus):
    data = build_data(config_of(corpus, "prepared", data__validation_fraction=0.2))
    assert data.train.text_tokens + data.held_out.text_tokens == sum(
        len(load_tokenizer(corpus / "tokenizer.json").encode(line))
        for line in (corpus / "lines.txt").read_text().splitlines()
    )
    assert 0.15 < data.held_out.text_bytes / (data.train.text_bytes + data.held_out.text_bytes) < 0.25


def test_a_data_set_has_its_first_documents_held_out(corpus):
    data = build_data(config_of(corpus, f"hf:{corpus / 'set'}", data__validation_documents=5))
    assert isinstance(data.train, StreamedWindows)
    assert len(data.train.held_out) == 5
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    first = (corpus / "lines.txt").read_text().splitlines()[:5]
    assert data.held_out.text_tokens == sum(len(tokenizer.encode(line)) for line in first)
    assert data.summary.startswith("a stream to train on, 0.00 MB held out")


def test_a_text_to_validate_on_leaves_the_whole_to_train_on(corpus):
    validation = write_text(corpus / "other.txt", seed=1)
    for name in ("prepared", "rows.jsonl", f"hf:{corpus / 'set'}"):
        data = build_data(config_of(corpus, name, data__validation_path=str(validation)))
        assert data.held_out.text_bytes == validation.stat().st_size
        if not name.startswith("hf:"):
            assert data.train.text_bytes == sum(
                len(line) for line in (corpus / "lines.txt").read_text().splitlines()
            )  # fmt: skip
        else:
            assert data.train.held_out == frozenset()


def test_a_mixture_of_everything(corpus):
    mixture = f"{corpus / 'prepared'}:2,{corpus / 'rows.jsonl'}:1,hf:{corpus / 'set'}:1"
    data = build_data(config_of(corpus, "", data__mixture=mixture, data__validation_documents=3))
    assert isinstance(data.train, Mixture)
    assert list(data.train.weights) == [2, 1, 1]
    parts = [build_data(config_of(corpus, name, data__validation_documents=3)) for name in ("prepared", "rows.jsonl")]
    assert len(data.held_out) == sum(len(part.held_out) for part in parts) + len(
        build_data(config_of(corpus, f"hf:{corpus / 'set'}", data__validation_documents=3)).held_out
    )
    assert "MB of text and a stream to train on" in data.summary
    assert next(training_batches(data.train, batch_size=4, seed=0))["inputs"].shape == (4, 24)


def test_the_vocabulary_is_the_tokenizers_or_larger(corpus):
    config = config_of(corpus)
    assert build_model_config(config).vocab_size == build_tokenizer(config).vocab_size == 290
    config.model.vocab_size = 320
    assert build_model_config(config).vocab_size == 320
    build_data(config)
    config.data.tokenizer = "not there.json"  # not read if the size is given
    assert build_model_config(config).vocab_size == 320


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model__vocab_size": 100},
            "model.vocab_size: got 100, expected at least 290, the vocabulary of data.tokenizer",
        ),
        ({"tokenizer": "absent.json"}, "no such tokenizer: .*absent.json"),
        ({"data": "prepared", "tokenizer": "bytes"}, "prepared was prepared with another tokenizer: .* bytes of bytes"),
        ({"data": "prepared", "tokenizer": "spm.model"}, "prepared was prepared with another tokenizer"),
        ({"data": "prepared", "data__validation_fraction": 1e-6}, "cannot hold out 1e-06 of 60 documents"),
        ({"data__field": "body"}, "rows.jsonl, line 1: no field 'body'; the row has 'id', 'text'"),
        ({"data": "rows.parquet", "data__field": "body"}, "rows.parquet: no field 'body'; the file has 'text'"),
        ({"data": "", "data__mixture": "a"}, "data.mixture: expected path:weight"),
        ({"data__mixture": "a:1"}, "data.mixture: got 'a:1' beside data.path"),
        ({"data__validation_path": "hf:a"}, "data.validation_path: got 'hf:a', expected a file or folder"),
        ({"data": "hf:"}, "'hf:' names no data set"),
        ({"data": "hf:x", "data__validation_documents": 0}, "data.validation_documents: got 0, expected at least 1"),
    ],
)
def test_bad_data_ends_in_one_error_before_anything_is_written(corpus, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        train(config_of(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hub_out_of_reach_is_an_error_of_the_configuration(corpus, tmp_path, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match="hf:a/b cannot be reached: .*osdn_jax.data.prepare"):
        train(config_of(corpus, "hf:a/b"), tmp_path / "run")


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "hub"])
def test_a_run_with_a_tokenizer_resumes_exactly_and_generates(corpus, tmp_path, kind):
    data = f"hf:{corpus / 'set'}" if kind == "hub" else kind
    config = config_of(
        corpus,
        data,
        data__validation_documents=6,
        data__shuffle_windows=4,
        model__vocab_size=300,
        steps=14,
        checkpoint__every=5,
        validation__every=7,
    )
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "halves", stop_at=8)
    train(config, tmp_path / "halves")
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")

    read = read_metrics(tmp_path / "whole")
    ratio = build_data(config).tokens_per_byte
    for row in read:
        if "train/bits_per_token" in row:
            assert math.isclose(row["train/bits_per_byte"], row["train/bits_per_token"] * ratio, rel_tol=1e-9)
    assert abs(read[0]["train/bits_per_token"] - math.log2(300)) < 0.3
    assert whole.bits_per_byte < read[0]["train/bits_per_byte"]  # it learns

    _, parameters = split_model(build_model(config))
    _, parameters = load_parameters(tmp_path / "whole" / "checkpoints", parameters)
    nats = 0.0
    held_out = build_data(config).held_out
    for window in held_out:
        inputs, ids = window["inputs"][None], window["segment_ids"][None]
        logits = reference_logits(build_model_config(config), parameters, inputs, ids)[0]
        likelihood = np.take_along_axis(logits, window["targets"][:, None], -1)[:, 0] - np.log(np.exp(logits).sum(-1))
        nats -= (likelihood * window["weights"]).sum()
    np.testing.assert_allclose(whole.bits_per_byte, nats / np.log(2) / held_out.text_bytes, rtol=1e-5)

    text = "".join(generate(tmp_path / "whole", "the memory", tokens=20, temperature=0.0))
    tokenizer = build_tokenizer(config)
    ids, apply = tokenizer.encode("the memory", bos=True), split_model(build_model(config))[0]
    drawn = list(sample(apply, parameters, ids, tokens=20, seed=0, temperature=0.0, forbidden=(0, *range(290, 300))))
    assert "the memory" + text == tokenizer.decode([*ids, *drawn])
