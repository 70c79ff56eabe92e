"""The training and validation windows of a run, as `config.data` describes them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from osdn_jax.data import (
    ByteTokenizer,
    Document,
    HubStream,
    JoinedWindows,
    Mixture,
    PackedWindows,
    PreparedTokens,
    StreamedWindows,
    TokenizedDocuments,
    Tokenizer,
    TokenWindows,
    WindowSource,
    is_prepared,
    load_tokenizer,
    parse_mixture,
    read_documents,
    shakespeare,
    split_documents,
)
from osdn_jax.data.recall import Task, TaskWindows
from osdn_jax.data.streamed_windows import digest
from osdn_jax.data.streams import HUB
from osdn_jax.training import fingerprints
from osdn_jax.training.tasks import configured_tasks

type Text = list[Document] | PreparedTokens

_FIRST_DOCUMENTS = 16  # documents in the fingerprint of a stream without held-out documents


class Data(NamedTuple):
    """The data that a run trains and validates on.

    Attributes:
        train: training windows, for `training_batches`.
        held_out: windows of config.validation.sequence_length, for `validation_batches`.
        tokens_per_byte: tokens per byte of the training text (of a stream: of its held-out documents); bits per token
            times this is bits per byte. 1 if tokens are bytes.
        held_out_tokens_per_byte: the same for the held-out text.
        summary: a description of the sizes.
        fingerprints: of the text, the held-out text and the tokenizer, for checkpoints. A stream's is that of its
            first documents: those that are held out, or a few.
        questions: the most targets of weight 1 in a held-out window of a task; None for text.
    """

    train: WindowSource | StreamedWindows | Mixture
    held_out: WindowSource
    tokens_per_byte: float
    held_out_tokens_per_byte: float
    summary: str
    fingerprints: dict[str, str]
    questions: int | None = None


class _Source(NamedTuple):
    """One source: its training windows, its held-out text and the fingerprint of its training text."""

    windows: TokenWindows | StreamedWindows
    held_out: Text | None
    fingerprint: str


def build_tokenizer(config: ConfigDict) -> Tokenizer:
    """Return the tokenizer of a run; for a run on data.task, whose tokens are not text, that of bytes.

    Args:
        config: with the keys of `default_config`; config.data and model.vocab_size are read.

    Raises:
        ValueError: its vocabulary is larger than model.vocab_size.
        ValueError, FileNotFoundError, ImportError: as `load_tokenizer`.

    Example:
        >>> from osdn_jax.training import build_tokenizer, default_config
        >>> build_tokenizer(default_config()).encode("ab").tolist()
        [97, 98]
    """
    if configured_tasks(config) is not None:  # its tokens are not text
        return ByteTokenizer()
    tokenizer = load_tokenizer(config.data.tokenizer)
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size: got {size}, expected at least {tokenizer.vocab_size}, the vocabulary of "
            f"data.tokenizer = {config.data.tokenizer}"
        )
    return tokenizer


def build_corpus(config: ConfigDict) -> tuple[list[Document], list[Document]]:
    """Return the (training, validation) documents of a text that fits in memory.

    Args:
        config: with the keys of `default_config`; config.data and config.seed are read.

    Raises:
        ValueError, TypeError, FileNotFoundError: the data cannot be used; the message says why.

    Example:
        >>> from osdn_jax.training import build_corpus, default_config
        >>> train, validation = build_corpus(default_config())  # Shakespeare's works
        >>> len(train), len(validation)
        (38, 4)
    """
    return _split_documents(config, config.data.path)


def build_data(config: ConfigDict) -> Data:
    """Return the training and validation windows of a run.

    Args:
        config: with the keys of `default_config`; config.data, the sequence lengths and config.seed are read.

    Raises:
        ValueError: a text that cannot be read or split, prepared data of another tokenizer, or a mixture or task that
            cannot be parsed.
        ConnectionError: the hub cannot be reached.
        FileNotFoundError, TypeError, ImportError: as the readers.

    Example:
        >>> from osdn_jax.training import build_data, default_config
        >>> build_data(default_config()).summary
        '4.54 MB of text to train on, 0.51 MB held out'
    """
    tokenizer, length = build_tokenizer(config), config.validation.sequence_length
    if (tasks := configured_tasks(config)) is not None:
        return _examples(config, *tasks, tokenizer)
    paths, weights = _mixture(config)
    sources = [(_streamed if path.startswith(HUB) else _stored)(config, path, tokenizer) for path in paths]
    train = [source.windows for source in sources]
    texts = [source.held_out for source in sources if source.held_out is not None]
    if config.data.validation_path:
        texts = [_whole(config, config.data.validation_path, tokenizer)]
    held_out = [_windows(text, tokenizer, length) for text in texts]
    counted = [windows for windows in train if not isinstance(windows, StreamedWindows)]
    sizes = [_size(counted)] * bool(counted) + ["a stream"] * (len(counted) < len(train))
    return Data(
        train=train[0] if len(train) == 1 else Mixture(train, weights),
        held_out=held_out[0] if len(held_out) == 1 else JoinedWindows(held_out),
        tokens_per_byte=_tokens_per_byte(counted or held_out),
        held_out_tokens_per_byte=_tokens_per_byte(held_out),
        summary=f"{' and '.join(sizes)} to train on, {_size(held_out, '')} held out",
        fingerprints={
            fingerprints.TEXT: fingerprints.of_several([source.fingerprint for source in sources]),
            fingerprints.HELD_OUT: fingerprints.of_several([_fingerprint(text) for text in texts]),
            fingerprints.TOKENIZER: fingerprints.of_tokenizer(tokenizer),
        },
    )


def _examples(config: ConfigDict, task: Task, held_out: Task, tokenizer: Tokenizer) -> Data:
    """Return the windows of a task; one of its targets counts as a byte."""
    settings = config.data
    examples = task.generate(settings.task_examples, part=0), held_out.generate(settings.validation_examples, part=1)
    train, validation = (TaskWindows(part) for part in examples)
    return Data(
        train=train,
        held_out=validation,
        tokens_per_byte=1.0,
        held_out_tokens_per_byte=1.0,
        summary=f"{len(train):,} examples of {task.name} to train on, {len(validation):,} held out",
        fingerprints={
            fingerprints.TEXT: fingerprints.of_examples(task.text, examples[0]),
            fingerprints.HELD_OUT: fingerprints.of_examples(held_out.text, examples[1]),
            fingerprints.TOKENIZER: fingerprints.of_tokenizer(tokenizer),
        },
        questions=validation.most_questions,
    )


def _fingerprint(text: Text) -> str:
    return fingerprints.of_prepared(text) if isinstance(text, PreparedTokens) else fingerprints.of_documents(text)


def _mixture(config: ConfigDict) -> tuple[list[str], list[float]]:
    """Return (paths, weights). Raises ValueError."""
    path, mixture = config.data.path, config.data.mixture
    if not mixture:
        return [path], [1.0]
    if path:
        raise ValueError(f"data.mixture: got {mixture!r} beside data.path = {path!r}; give one of them")
    try:
        parts = parse_mixture(mixture)
    except ValueError as error:
        raise ValueError(f"data.mixture: {error}") from error
    return [path for path, _ in parts], [weight for _, weight in parts]


def _stored(config: ConfigDict, path: str, tokenizer: Tokenizer) -> _Source:
    """Open a text on disk; nothing is held out if there is a separate text to validate on."""
    train: Text
    held_out: Text | None
    if path and config.data.validation_path:
        train, held_out = _whole(config, path, tokenizer), None
    elif path and is_prepared(path):
        train, held_out = _prepared(path, tokenizer).split(config.data.validation_fraction)
    else:
        train, held_out = _split_documents(config, path)
    return _Source(_windows(train, tokenizer, config.sequence_length), held_out, _fingerprint(train))


def _split_documents(config: ConfigDict, path: str) -> tuple[list[Document], list[Document]]:
    if not path:
        return shakespeare("train"), shakespeare("validation")
    documents = read_documents(path, field=config.data.field)
    train, validation = split_documents(documents, config.data.validation_fraction, config.seed)
    return list(train), list(validation)


def _whole(config: ConfigDict, path: str, tokenizer: Tokenizer) -> Text:
    if path.startswith(HUB):
        raise ValueError(f"data.validation_path: got {path!r}, expected a file or folder; prepare it first")
    return _prepared(path, tokenizer) if is_prepared(path) else read_documents(path, field=config.data.field)


def _prepared(path: str, tokenizer: Tokenizer) -> PreparedTokens:
    tokens = PreparedTokens(path)
    tokens.manifest.check_tokenizer(tokenizer, path)
    return tokens


def _streamed(config: ConfigDict, path: str, tokenizer: Tokenizer) -> _Source:
    """Open a stream; its first documents are held out unless there is a separate text to validate on."""
    settings = config.data

    def opened(shard_index: int, shard_count: int) -> HubStream:
        return HubStream(
            path,
            field=settings.field,
            subset=settings.subset,
            split=settings.split,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    held_out = None
    if not settings.validation_path:
        if settings.validation_documents < 1:
            raise ValueError(f"data.validation_documents: got {settings.validation_documents}, expected at least 1")
        held_out = list(itertools.islice(opened(0, 1), settings.validation_documents))
    first = itertools.islice(opened(0, 1), _FIRST_DOCUMENTS) if held_out is None else held_out
    windows = StreamedWindows(
        opened,
        tokenizer,
        config.sequence_length,
        held_out=[digest(document) for document in held_out or ()],
        shuffle=settings.shuffle_windows,
    )
    return _Source(windows, held_out, fingerprints.of_documents(first))


def _windows(text: Text, tokenizer: Tokenizer, length: int) -> TokenWindows:
    if isinstance(text, PreparedTokens):
        return TokenWindows(text, length)
    if isinstance(tokenizer, ByteTokenizer):
        return PackedWindows(text, length)
    return TokenWindows(TokenizedDocuments(text, tokenizer), length)


def _tokens_per_byte(windows: Sequence[TokenWindows | StreamedWindows]) -> float:
    counted = [source for source in windows if not isinstance(source, StreamedWindows)]
    return sum(source.text_tokens for source in counted) / sum(source.text_bytes for source in counted)


def _size(windows: Sequence[TokenWindows], of_what: str = " of text") -> str:
    return f"{sum(source.text_bytes for source in windows) / 1e6:.2f} MB{of_what}"
