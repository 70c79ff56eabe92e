"""Text as tokens, packed into windows, in batches that can be resumed. NumPy arrays: nothing here runs on a device."""

from osdn_jax.data.batches import ValidationBatches, training_batches, validation_batches
from osdn_jax.data.compressors import compressed_bits_per_byte
from osdn_jax.data.corpus import VALIDATION_PLAYS, shakespeare
from osdn_jax.data.documents import Document
from osdn_jax.data.manifest import Manifest, load_manifest
from osdn_jax.data.mixture import JoinedWindows, Mixture, parse_mixture
from osdn_jax.data.prepared import PreparedTokens, is_prepared
from osdn_jax.data.reading import SUPPORTED_ENDINGS, read_documents
from osdn_jax.data.splitting import split_documents
from osdn_jax.data.streamed import StreamedWindows
from osdn_jax.data.streams import DocumentStream, FileStream, HubStream, open_stream
from osdn_jax.data.token_windows import TokenizedDocuments, TokenStream, TokenWindows
from osdn_jax.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenDecoder,
    Tokenizer,
    load_tokenizer,
)
from osdn_jax.data.tokens import ByteTokenizer, StreamDecoder
from osdn_jax.data.windows import PackedWindows, Window, WindowSource

__all__ = [
    "SUPPORTED_ENDINGS",
    "VALIDATION_PLAYS",
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
    "compressed_bits_per_byte",
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
