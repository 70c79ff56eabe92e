"""Measure the memory that loading a checkpoint takes:  python -m benchmarks.load_memory

Writes a checkpoint with random bfloat16 tensors, of 1.3 billion parameters by default, and loads it in a separate
process for each dtype: in the layout of Transformers' Qwen3.5, or with --model experts in that of Qwen3-Next, whose
files have the tensors of each expert, and whose model has those of a layer in one array. Reports the peak of the
resident memory of each process and that of one that imports the package and loads nothing, so that the difference is
the model and what loading adds.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from osdn_jax import command, interop
from osdn_jax.compare.machine import environment
from osdn_jax.interop import safetensors
from osdn_jax.interop.families import family_of
from osdn_jax.interop.loading import parameter_shapes
from osdn_jax.interop.mapping import Shape
from osdn_jax.interop.plan import match

_SHARED = {
    "dtype": "bfloat16",
    "vocab_size": 50_304,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_DENSE = {
    "model_type": "qwen3_5_text",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    **_SHARED,
}
_EXPERTS = {
    "model_type": "qwen3_next",
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    **_SHARED,
}
MODELS = {"dense": _DENSE, "experts": _EXPERTS}
_SHARD = 500_000_000  # bytes
_CASES = ("nothing", "as stored", "bfloat16", "float32")


def main() -> None:
    """Write the checkpoint, or load it as one case, and report."""
    parser = command.Parser(prog="python -m benchmarks.load_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="dense", help="dense (default) or experts")
    parser.add_argument("--layers", type=int, help="of the model (default: those of 1.3 billion parameters)")
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # one case, in its own process
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(_load(given.folder, given.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        config = MODELS[given.model]
        layers = {} if given.layers is None else {"num_hidden_layers": given.layers}
        parameters, size = write_checkpoint(Path(folder), config | layers)
        rows = [_measured(folder, case) for case in _CASES]
    print(f"{parameters:,} parameters, {size:,} bytes of bfloat16")
    for row in rows:
        print(f"{row['case']:10} {row['peak_bytes'] / 1e9:6.2f} GB at most, {row['seconds']:6.1f} s")
    if given.output:
        about = environment(shlex.join(["python", "-m", "benchmarks.load_memory", *sys.argv[1:]]))
        result = {**about, "parameters": parameters, "bytes": size, "cases": rows}
        Path(given.output).write_text(json.dumps(result, indent=1) + "\n")


def write_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Write config.json and random tensors in files of at most half a gigabyte; return (parameters, bytes)."""
    family = family_of(config)
    model = family.describe(config)
    shapes = parameter_shapes(model)
    sources = match(family.rows(model, config, ()), shapes, {}).sources
    tensors = [(name, shape) for s in sources for names, shape in zip(s.names, s.shapes, strict=True) for name in names]
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, Shape, np.dtype]]] = [[]]
    used, dtype = 0, np.dtype(jnp.bfloat16)
    for name, shape in tensors:
        size = 2 * int(np.prod(shape))
        if shards[-1] and used + size > _SHARD:
            shards.append([])
            used = 0
        shards[-1].append((name, shape, dtype))
        used += size
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        kept = {name: shape for name, shape, _ in shard}
        safetensors.write(folder / file, shard, lambda name, kept=kept: _random(name, kept[name]), {"format": "pt"})
        places |= dict.fromkeys(kept, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(int(np.prod(shape)) for shape in shapes.values()), sum(2 * int(np.prod(s)) for _, s in tensors)


def _random(name: str, shape: Shape) -> np.ndarray:
    rng = np.random.default_rng(abs(hash(name)))
    return (0.02 * rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)


def _load(folder: str, case: str) -> dict[str, Any]:
    start = time.perf_counter()
    if case != "nothing":
        model = interop.load_pretrained(folder, dtype=None if case == "as stored" else case)
        model.norm.scale[...].block_until_ready()
    return {"case": case, "peak_bytes": _peak(), "seconds": round(time.perf_counter() - start, 2)}


def _peak() -> int:
    """Return the most resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent process too, up to the exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _measured(folder: str, case: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "benchmarks.load_memory", "--load", case, "--folder", folder]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    command.run(main)
