"""Text as tokens, packed into windows, in batches that can be resumed. Everything is NumPy arrays on the host."""

from osdn_jax._optional import check_installed, needs_extra

with needs_extra("train", "osdn_jax.data"):
    check_installed("grain")  # which is imported on first use
    from osdn_jax.data.batches import (
        JoinedWindows,
        Mixture,
        ValidationBatches,
        parse_mixture,
        training_batches,
        validation_batches,
    )
    from osdn_jax.data.byte_tokenizer import ByteTokenizer, StreamDecoder
    from osdn_jax.data.documents import SUPPORTED_ENDINGS, Document, read_documents
    from osdn_jax.data.shakespeare_works import VALIDATION_PLAYS, shakespeare
    from osdn_jax.data.shards import Manifest, PreparedTokens, is_prepared, load_manifest
    from osdn_jax.data.splitting import split_documents
    from osdn_jax.data.streamed_windows import StreamedWindows
    from osdn_jax.data.streams import DocumentStream, FileStream, HubStream, open_stream
    from osdn_jax.data.tokenizers import (
        HuggingFaceTokenizer,
        SentencePieceTokenizer,
        TokenDecoder,
        Tokenizer,
        load_tokenizer,
    )
    from osdn_jax.data.windows import (
        ByteDocuments,
        PackedWindows,
        TokenizedDocuments,
        TokenStream,
        TokenWindows,
        Window,
        WindowSource,
    )

__all__ = [
    "SUPPORTED_ENDINGS",
    "VALIDATION_PLAYS",
    "ByteDocuments",
    "ByteTokenizer",
    "Document",
    "DocumentStream",
    "FileStream",
    "HubStream",
    "HuggingFaceTokenizer",
    "JoinedWindows",
    "Manifest",
    "Mixture",
    "PackedWindows",
    "PreparedTokens",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "StreamedWindows",
    "TokenDecoder",
    "TokenStream",
    "TokenWindows",
    "TokenizedDocuments",
    "Tokenizer",
    "ValidationBatches",
    "Window",
    "WindowSource",
    "is_prepared",
    "load_manifest",
    "load_tokenizer",
    "open_stream",
    "parse_mixture",
    "read_documents",
    "shakespeare",
    "split_documents",
    "training_batches",
    "validation_batches",
]
