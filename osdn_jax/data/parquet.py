"""A column of text in a Parquet file, read with pyarrow a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osdn_jax.data.extras import require

_ROWS = 256  # at a time


def parquet_values(file: Path, field: str) -> Iterator[str | None]:
    """The values of the column `field`, in order, without holding a row group as text in memory.

    Raises ImportError where pyarrow is missing; ValueError, naming the file, if it is no complete Parquet file, if it
    has no such column (names those there are) or if that is not of strings.
    """
    require("pyarrow", "data", "reading .parquet files")
    pyarrow: Any = require("pyarrow.parquet", "data", "reading .parquet files")
    types: Any = require("pyarrow.types", "data", "reading .parquet files")
    errors = require("pyarrow.lib", "data", "reading .parquet files").ArrowException
    try:
        with pyarrow.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if field not in schema.names:
                there = ", ".join(map(repr, schema.names)) or "no fields"
                raise ValueError(f"{file}: no field {field!r}; the file has {there}")
            kind = schema.field(field).type
            value = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
                raise ValueError(f"{file}: field {field!r} must be of strings; got {kind}")
            for batch in parquet.iter_batches(batch_size=_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (errors, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a complete Parquet file: {error}") from error
