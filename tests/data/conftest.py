"""A small corpus on disk, tokenizers for it and the shards prepared from it."""

import shutil

import pytest

from support.corpora import TEXTS, prepare_rows, write_jsonl, write_sentencepiece, write_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The texts as rows.jsonl, as the data set "set" of two files and prepared, with two tokenizers."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder / "tokenizer.json")
    write_sentencepiece(folder / "spm.model")
    write_jsonl(folder / "rows.jsonl")
    prepare_rows(folder, folder / "prepared")
    (folder / "set").mkdir()
    write_jsonl(folder / "set" / "train-0.jsonl", TEXTS[:3])
    write_jsonl(folder / "set" / "train-1.jsonl", TEXTS[3:])
    return folder


@pytest.fixture
def prepared(corpus):
    """The folder of prepared shards; tests must not change it."""
    return corpus / "prepared"


@pytest.fixture
def shards(prepared, tmp_path):
    """A copy of the prepared folder, to damage."""
    return shutil.copytree(prepared, tmp_path / "shards")
