import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """The version, read from the package's source: importing it here would need its dependencies."""
    source = (HERE / "osdn_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\s*=\s*"([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('osdn_jax/__init__.py has no line `__version__ = "..."`')
    return found.group(1)


setup(
    name="osdn-jax",
    version=read_version(),
    description="Preconditioned delta-rule sequence models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The osdn-jax authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["osdn_jax*", "pallas_kernels*"]),
    package_data={
        "osdn_jax": ["py.typed"],
        "osdn_jax.data": ["*.xz", "*.md"],
        "pallas_kernels": ["targets/*.txtpb"],
        "pallas_kernels.aot": ["*.json"],
    },
    python_requires=">=3.12",
    install_requires=[
        "jax>=0.11.2",
        "flax>=0.12",  # nnx modules are pytrees; nnx.List
        "optax",
        "orbax-checkpoint",
        "ml-collections",
        "grain",
        "numpy>=2",
        "absl-py",
        "matplotlib",
        "rich",
        "jaxtyping>=0.3",
        "tensorboardX",
    ],
    extras_require={
        "gpu": ["jax[cuda13]"],
        "triton": ["jax-triton"],
        "tokenizers": ["tokenizers>=0.20", "sentencepiece>=0.2"],
        "data": ["pyarrow", "array_record", "datasets>=4"],
        "interop": ["safetensors"],
        "eval": ["lm-eval"],
        "test": [
            "pytest>=8.4",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "safetensors",
            "tokenizers>=0.20",
            "sentencepiece>=0.2",
            "pyarrow",
            "array_record",
            "datasets>=4",
        ],
        "lint": ["ruff>=0.15", "mypy>=1.18"],
    },
)
