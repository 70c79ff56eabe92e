"""Text as bytes, packed into windows, in batches that can be resumed. NumPy arrays: nothing here runs on a device."""

from osdn_jax.data.batches import ValidationBatches, training_batches, validation_batches
from osdn_jax.data.compressors import compressed_bits_per_byte
from osdn_jax.data.corpus import VALIDATION_PLAYS, shakespeare
from osdn_jax.data.documents import Document
from osdn_jax.data.reading import SUPPORTED_ENDINGS, read_documents
from osdn_jax.data.splitting import split_documents
from osdn_jax.data.tokens import ByteTokenizer, StreamDecoder
from osdn_jax.data.windows import PackedWindows, Window, WindowSource

__all__ = [
    "SUPPORTED_ENDINGS",
    "VALIDATION_PLAYS",
    "ByteTokenizer",
    "Document",
    "PackedWindows",
    "StreamDecoder",
    "ValidationBatches",
    "Window",
    "WindowSource",
    "compressed_bits_per_byte",
    "read_documents",
    "shakespeare",
    "split_documents",
    "training_batches",
    "validation_batches",
]
