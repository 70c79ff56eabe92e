"""Perplexity by position against one call for each window."""

import numpy as np
import pytest

from osdn_jax.data import Document, load_tokenizer
from osdn_jax.evaluation import perplexity_by_position, position_windows
from osdn_jax.evaluation.position_plot import plot_positions
from support.text import byte_model, log_likelihoods


def windows_of(count, size, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, size))


def test_buckets_are_those_of_whole_windows():
    tokens = windows_of(5, 60)
    tokens[:, 20] = 0
    done = []
    found = perplexity_by_position(*byte_model(), [tokens[:3], tokens[3:]], bucket=16, ignored=0, progress=done.append)
    assert done == [3, 2]
    assert [(x.start, x.stop) for x in found] == [(0, 16), (16, 32), (32, 48), (48, 59)]
    nats = -np.stack([log_likelihoods(row)[0] for row in tokens]).astype(np.float64)
    scored = tokens[:, 1:] != 0
    for bucket in found:
        part = slice(bucket.start, bucket.stop)
        values, counted = nats[:, part], scored[:, part]
        assert (bucket.tokens, bucket.windows) == (counted.sum(), 5)
        assert bucket.nats == pytest.approx(values[counted].mean(), rel=1e-5)
        assert bucket.perplexity == pytest.approx(np.exp(values[counted].mean()), rel=1e-4)


def test_the_error_is_that_of_a_mean_over_windows():
    tokens = windows_of(6, 33, seed=1)
    (bucket,) = perplexity_by_position(*byte_model(), [tokens], bucket=32)
    means = np.array([-log_likelihoods(row)[0].mean() for row in tokens], np.float64)
    assert bucket.error == pytest.approx(means.std(ddof=1) / np.sqrt(6), rel=1e-3)
    (one,) = perplexity_by_position(*byte_model(), [tokens[:1]], bucket=32)
    assert np.isnan(one.error)


@pytest.mark.parametrize(
    ("windows", "bucket", "message"),
    [
        ([], 4, "windows: got none, expected at least one"),
        ([np.zeros((2, 9), int)], 0, "bucket: got 0, expected at least 1"),
        ([np.zeros((2, 1), int)], 4, r"windows: got an array of shape \[2, 1\]"),
        ([np.zeros((2, 9), int), np.zeros((2, 8), int)], 4, r"shape \[2, 8\], expected \[B, 9\]"),
    ],
)
def test_wrong_windows_are_named(windows, bucket, message):
    with pytest.raises(ValueError, match=message):
        perplexity_by_position(*byte_model(), windows, bucket=bucket)


def test_windows_follow_each_other():
    tokenizer = load_tokenizer("bytes")
    documents = [Document("a", b"abcdefg"), Document("b", b"hij"), Document("c", b"klmnopq")]
    stream = np.concatenate([tokenizer.encode(x.text.decode(), bos=True) for x in documents])
    batches = list(position_windows(documents, tokenizer, length=4, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2]
    for number, window in enumerate(np.concatenate(batches)):
        np.testing.assert_array_equal(window, stream[4 * number : 4 * number + 5])
    limited = position_windows(documents, tokenizer, length=4, batch_size=2, limit=3)
    assert sum(len(batch) for batch in limited) == 3
    with pytest.raises(ValueError, match="length: got 40, but the text has no window of 41 tokens"):
        list(position_windows(documents, tokenizer, length=40, batch_size=2))


def test_the_plot_is_a_picture(tmp_path):
    found = perplexity_by_position(*byte_model(), [windows_of(3, 33)], bucket=8)
    plot_positions({"osdn": found}, tmp_path / "a.png", title="Title", trained=16)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="models: got none"):
        plot_positions({}, tmp_path / "b.png", title="Title")
