"""A folder loaded onto a mesh over two processes: logits, another rule, and generation are those of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from osdn_jax import interop
from osdn_jax.generation import Generator
from support import pretrained

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 20, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 8, "intermediate_size": 12}
IDS = np.arange(12).reshape(2, 6)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]
OPTIONS = {"max_tokens": 4, "temperature": 0.0}
PROGRAM = f"""
import json
import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
from osdn_jax import interop, nn
from osdn_jax.generation import Generator

sizes = [{{"fsdp": 2, "tensor": 2}}.get(axis, 1) for axis in nn.MESH_AXES]
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(sizes), nn.MESH_AXES)
model = interop.load_pretrained(sys.argv[3], mesh=mesh)
changed = interop.replace_rule(model, preconditioner="hypergradient")
ids = np.array({IDS.tolist()})
said = [process_allgather(interop.logits(found, ids), tiled=True).tolist() for found in (model, changed)]
said.append([row.tokens for row in Generator(model).generate({PROMPTS}, **{OPTIONS})])
try:
    interop.save_pretrained(model, sys.argv[3] + "-again")
except ValueError as error:
    said.append(str(error))
with open(sys.argv[4], "w") as file:
    json.dump(said, file)
"""


def test_two_processes_equal_one(tmp_path):
    folder = tmp_path / "model"
    config = pretrained.config_of("qwen3_next", **SIZES)
    pretrained.write_folder(folder, config, pretrained.tensors_of(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    files = [tmp_path / f"said-{rank}" for rank in (0, 1)]
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(rank), str(folder), str(file)], **pipes)
        for rank, file in enumerate(files)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    said = [json.loads(file.read_text()) for file in files]
    assert said[0] == said[1]
    logits, changed, tokens, error = said[0]
    model = interop.load_pretrained(folder)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(logits, interop.logits(model, IDS), atol=1e-5)
        np.testing.assert_allclose(changed, logits, atol=1e-6)
        assert tokens == [row.tokens for row in Generator(model).generate(PROMPTS, **OPTIONS)]
    assert "is partly on other processes, expected all parameters on this one" in error
