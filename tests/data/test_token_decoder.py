"""Streamed text equals the text of all tokens, for every tokenizer and every start of the stream."""

import numpy as np
import pytest
from tokenizers.decoders import DecodeStream

from osdn_jax.data import TokenDecoder, load_tokenizer
from support.corpora import write_byte_fallback, write_sentencepiece, write_tokenizer

TEXT = "日本語のテキスト the memory — reads 😀😀😀 é  back\n👨‍👩‍👧 กขค ok"
HALF = "\N{REPLACEMENT CHARACTER}"
BYTE_FALLBACK = ["llama", "gemma", "metaspace"]
KINDS = ["bytes", "byte-level", "sentencepiece", *BYTE_FALLBACK]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {style: load_tokenizer(write_byte_fallback(folder / f"{style}.json", style)) for style in BYTE_FALLBACK}
    return found | {
        "bytes": load_tokenizer(),
        "byte-level": load_tokenizer(write_tokenizer(folder / "tokenizer.json")),
        "sentencepiece": load_tokenizer(write_sentencepiece(folder / "spm.model")),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def streamed(tokenizer, ids, context=()):
    decoder = tokenizer.stream_decoder(context)
    return [decoder.push(int(token)) for token in ids] + [decoder.finish()]


def ids_of(tokenizer, *tokens):
    """Return token ids, given bytes as integers and other tokens by name."""
    find = tokenizer._tokenizer.token_to_id if hasattr(tokenizer, "_tokenizer") else tokenizer._processor.piece_to_id
    return [find(f"<0x{token:02X}>" if isinstance(token, int) else token) for token in tokens]


def test_the_text_is_complete_wherever_the_stream_starts(tokenizer):
    ids = tokenizer.encode(TEXT, bos=True)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if HALF in before:
            continue  # part of this character has not been emitted
        pieces = streamed(tokenizer, ids[cut:], ids[:cut])
        assert before + "".join(pieces) == whole
        assert not any(HALF in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte-level"])
def test_pieces_equal_those_of_the_library(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(TEXT, bos=True).tolist()
    library = DecodeStream(skip_special_tokens=True)
    wanted = [library.step(tokenizer._tokenizer, token) or "" for token in ids]
    assert streamed(tokenizer, ids) == [*wanted, ""]


def test_random_tokens_decode_as_they_do_together(request, tokenizer):
    rng = np.random.default_rng(0)
    some = [tokenizer.encode(letter).tolist() for letter in "日é😀"]
    for trial in range(300):
        pool = rng.choice(tokenizer.vocab_size, 8) if trial % 2 else np.arange(tokenizer.vocab_size)
        if request.node.callspec.params["tokenizer"] in BYTE_FALLBACK:
            # In these an invalid byte changes, in hindsight, the text of the bytes before it.
            pool = [token for token in pool if not 3 + 128 <= token < 3 + 256]
        drawn = [[int(rng.choice([0, *pool]))] for _ in range(rng.integers(1, 30))]
        ids = sum((some[rng.integers(3)] if rng.random() < 0.2 else token for token in drawn), [])
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [*BYTE_FALLBACK, "sentencepiece"])
def test_invalid_bytes_leave_their_neighbours_unchanged(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for tokens, wanted in (
        ((0xE6, 0x97, 0xA5, 0xFF, 0xE6, 0x97, 0xA5), ["", "", "日", HALF, "", "", "日", ""]),
        ((0xE6, 0x97, "a", 0xA5, "a"), ["", "", f"{HALF * 2}a", HALF, "a", ""]),
        (("a", 0xF0, 0x9F, 0xF0, 0x9F, 0x98, 0x80), ["a", "", "", HALF * 2, "", "", "😀", ""]),
        ((0xFF, "▁", "a"), [HALF, " ", "a", ""]),  # the blank is not dropped as one at the start would be
        ((0xE6, 0x97, 0xA5, "▁", "▁", 0x0A, 0x20, "▁", "a"), ["", "", "日", " ", " ", "\n", " ", " ", "a", ""]),
    ):
        assert streamed(tokenizer, ids_of(tokenizer, *tokens)) == wanted


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_special_tokens_do_not_split_the_bytes_of_a_character(tokenizers, kind):
    ids = ids_of(tokenizers[kind], 0xE6, "<s>", 0x97, "</s>", 0xA5, "<s>", "▁", "a")
    assert "".join(streamed(tokenizers[kind], ids)) == tokenizers[kind].decode(ids) == "日 a"


def test_the_end_of_half_a_character(tokenizers):
    for kind in (*BYTE_FALLBACK, "sentencepiece"):
        ids = ids_of(tokenizers[kind], "a", 0xE6, 0x97)
        decoder = tokenizers[kind].stream_decoder()
        assert decoder.push(ids) == "a"
        assert decoder.finish() == HALF * 2 == tokenizers[kind].decode(ids)[1:]
        assert decoder.finish() == ""
        assert decoder.push(ids_of(tokenizers[kind], 0xA5, "a")) == f"{HALF}a"  # the decoder is reused


def test_a_stream_completes_a_character_of_its_context(tokenizers):
    for kind in (*BYTE_FALLBACK, "sentencepiece", "byte-level"):
        ids = tokenizers[kind].encode("a日本")
        assert streamed(tokenizers[kind], ids[-1:], ids[:-1]) == ["本", ""]


def test_long_streams_decode_few_tokens_at_a_time(tokenizer):
    """Only a few tokens are decoded again, even if no character is ever complete or visible."""
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return tokenizer.decode(ids)

    for ids in (tokenizer.encode("é\n\n" * 200), [tokenizer.bos_id] * 300, np.arange(300) % 7 + 100):
        decoder = TokenDecoder(decode)
        text = "".join([decoder.push(int(token)) for token in ids]) + decoder.finish()
        assert text.count(HALF) == tokenizer.decode(ids).count(HALF)
        assert max(sizes) < 100


def test_an_invalid_id_leaves_the_decoder_unchanged(tokenizers):
    for kind in ("llama", "byte-level", "sentencepiece"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("日本 a").tolist()
        decoder = tokenizer.stream_decoder()
        emitted = decoder.push(ids[:-3])
        with pytest.raises(ValueError, match=f"got {tokenizer.vocab_size} at position 1"):
            decoder.push([ids[0], tokenizer.vocab_size])
        with pytest.raises(TypeError, match="integers"):
            decoder.push([0.5])
        assert emitted + decoder.push(ids[-3:]) + decoder.finish() == tokenizer.decode(ids)


def test_names_of_bytes_are_text_without_byte_fallback(tmp_path):
    file = write_byte_fallback(tmp_path / "tokenizer.json", "gemma")
    file.write_text(file.read_text().replace('"ByteFallback"', '"Fuse"'))
    tokenizer = load_tokenizer(file)
    ids = ids_of(tokenizer, 0xE6, "a")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "<0xE6>a"
