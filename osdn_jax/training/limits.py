"""Sizes that exceed the memory, detected before anything is allocated."""

import os

import jax
from ml_collections import ConfigDict

from osdn_jax._errors import first_line
from osdn_jax.nn import parameter_formula
from osdn_jax.training.build import build_model_config

_ARRAYS = 4 * 4  # bytes of a token in a batch: inputs, targets, segment ids and weights


def check_memory(config: ConfigDict) -> None:
    """Raise ValueError if a batch or the parameters alone exceed all available memory.

    A run that passes may still be too large: `python train.py --plan` reports what a step needs.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for prefix, settings in (("", config), ("validation.", config.validation)):
        rows, length = settings.batch_size, settings.sequence_length
        size = rows * length * _ARRAYS // jax.process_count()
        if size > host:
            raise ValueError(
                f"{prefix}batch_size × {prefix}sequence_length: got {rows} × {length}, {_gigabytes(size)} in a batch, "
                f"expected less than the {_gigabytes(host)} of this machine"
            )
    parameters = parameter_formula(build_model_config(config))
    memory = sum((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()) or host
    memory *= jax.process_count()
    if 4 * parameters > memory:
        raise ValueError(
            f"model: got {parameters:,} parameters, {_gigabytes(4 * parameters)}, "
            f"expected less than the {_gigabytes(memory)} of the devices"
        )


def out_of_memory(error: BaseException) -> str | None:
    """Return a message of one line if the error means that memory has run out; None for any other error."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"out of memory: {first_line(error)}. A smaller batch_size, a larger accumulate or --config.model.remat=blocks "
        "needs less; --plan says how much"
    )


def _gigabytes(size: int) -> str:
    return f"{size // 10**9:,} GB"
