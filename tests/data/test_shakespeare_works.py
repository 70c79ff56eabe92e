"""The packaged text."""

import hashlib
import importlib.util
import lzma
from pathlib import Path

import pytest

from osdn_jax.data import VALIDATION_PLAYS, shakespeare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_shakespeare", ROOT / "tools" / "build_shakespeare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_splits_are_whole_works_and_disjoint():
    train, validation = shakespeare("train"), shakespeare("validation")
    assert tuple(work.name for work in validation) == VALIDATION_PLAYS
    assert (len(train), len(validation)) == (38, 4)
    assert len({work.name for work in train + validation}) == 42
    assert sum(len(work.text) for work in train) == 4_543_824
    assert sum(len(work.text) for work in validation) == 513_374


def test_the_text_is_clean_ascii():
    for work in shakespeare("train") + shakespeare("validation"):
        assert b"by William Shakespeare" in work.text[:100]
        text = work.text.decode("ascii")
        assert text.replace("\n", " ").isprintable(), work.name
        assert "gutenberg" not in text.lower()
    hamlet = next(work for work in shakespeare("train") if work.name == "hamlet")
    assert b"To be, or not to be,--that is the question:--" in hamlet.text


def test_callers_cannot_change_the_corpus():
    shakespeare("train").clear()
    assert len(shakespeare("train")) == 38


def test_unknown_split():
    with pytest.raises(ValueError, match='split must be "train" or "validation"; got \'test\''):
        shakespeare("test")


def test_the_file_is_the_recorded_one(builder):
    data = (ROOT / "osdn_jax" / "data" / "shakespeare_works.xz").read_bytes()
    provenance = (ROOT / "osdn_jax" / "data" / "PROVENANCE.md").read_text()
    assert hashlib.sha256(data).hexdigest() == builder.OUTPUT_SHA256
    assert hashlib.sha256(lzma.decompress(data)).hexdigest() == builder.PAYLOAD_SHA256
    for checksum in (builder.SDIST_SHA256, builder.PAYLOAD_SHA256, builder.OUTPUT_SHA256):
        assert checksum in provenance


def test_packing_gives_the_file_back(builder):
    works = {work.name: work.text for work in shakespeare("validation") + shakespeare("train")}
    assert hashlib.sha256(builder.pack(works)).hexdigest() == builder.PAYLOAD_SHA256


def test_the_builder_refuses_another_source(builder, tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    with pytest.raises(builder.BuildError, match=r"sha256 is .*, expected f393d09d"):
        builder.build(tmp_path / "other.tar.gz")
    with pytest.raises(builder.BuildError, match="a holds a NUL byte"):
        builder.pack({"a": b"\0"})
