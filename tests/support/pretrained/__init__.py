"""Checkpoints in the layouts of Transformers, written by the tests, and a NumPy model that reads nothing but them."""

from support.pretrained.configs import config_of
from support.pretrained.files import TYPES, read_folder, read_safetensors, write_folder, write_safetensors
from support.pretrained.reference import reference
from support.pretrained.tensors import tensors_of

__all__ = [
    "TYPES",
    "config_of",
    "read_folder",
    "read_safetensors",
    "reference",
    "tensors_of",
    "write_folder",
    "write_safetensors",
]
