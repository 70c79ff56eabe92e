"""Bits per byte of general compressors: the yardstick beside a byte-level language model."""

import gzip
import lzma


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Compressed size of `data` in bits for each of its bytes, headers included, by compressor name.

    The names are the command lines with the same result to within a few bytes. A model that has read other text has
    an advantage over these, which start from nothing. Raises TypeError unless `data` is bytes, ValueError if empty.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes; got {type(data).__name__}")
    if not data:
        raise ValueError("data must not be empty: bits per byte are not defined without a byte")
    # mtime=0: the size does not depend on it, but identical input should give an identical file.
    compressed = {"gzip -9": gzip.compress(data, 9, mtime=0), "xz -9": lzma.compress(data, preset=9)}
    return {name: 8 * len(result) / len(data) for name, result in compressed.items()}
