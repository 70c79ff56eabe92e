"""Tokens per second of generation, and the error of bfloat16 states:  python -m benchmarks.generation

Steps are timed at several batch sizes and positions, for a recurrent model, a hybrid and softmax attention. A state at
a position is made without a prompt: its attention caches have the size and the position, and hold zeros, on which the
time of a step does not depend. The error is that of logits after thousands of single steps, each from a state that was
rounded to bfloat16, against float32 states.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osdn_jax import command, nn
from osdn_jax.generation import Generator
from osdn_jax.generation.engine import Run
from osdn_jax.generation.programs import BLOCK
from osdn_jax.generation.request import Request
from osdn_jax.generation.states import GenerationState, map_caches, number_of_bytes
from osdn_jax.nn.config import BlockConfig, MLPConfig

RESULTS = Path(__file__).parent / "results"
_SIZES = {"width": 256, "heads": 4, "key_dim": 64, "value_dim": 64}
_DELTA, _ATTENTION = nn.mixer_config("gated_delta_net", **_SIZES), nn.mixer_config("transformer", **_SIZES)
MODELS = {
    "gated_delta_net": (_DELTA, _DELTA, _DELTA, _DELTA),
    "hybrid, 3 : 1": (_DELTA, _DELTA, _DELTA, _ATTENTION),
    "attention": (_ATTENTION, _ATTENTION, _ATTENTION, _ATTENTION),
}
_VOCABULARY, _MLP = 4096, 512
NOTES = [
    "",
    "The state is donated: a step of attention writes one slot of its cache in place, and reads keys and values in the",
    "order of the cache, [B, heads, tokens, channels].",
]
_SECONDS = 3  # of the calls of a case, about


def generator_of(name: str) -> Generator:
    blocks = tuple(BlockConfig(mixer, MLPConfig(_MLP)) for mixer in MODELS[name])
    config = nn.ModelConfig(vocab_size=_VOCABULARY, blocks=blocks)
    return Generator(nn.CausalLM(config, rngs=nnx.Rngs(0)))


def step_time(generator: Generator, rows: int, position: int, rounds: int) -> tuple[float, int]:
    """Return (median seconds of a step, bytes of the blocks' states)."""
    engine = generator.model.engine(position + BLOCK * (rounds + 3))
    texts = [np.asarray([1], np.int32)] * rows
    state = engine.start(generator.parameters, texts)
    blocks = map_caches(lambda cache: cache._replace(position=jnp.int32(position)), state.blocks)
    state = GenerationState(blocks, state.token, state.seen, np.full(rows, position, np.int32))
    request = Request(texts, generator.vocabulary, None, {"max_tokens": BLOCK * (rounds + 2), "temperature": 0.0})
    run = Run(engine, generator.parameters, state, request.batch(list(range(rows))).settings)
    size = number_of_bytes(state.blocks)
    times, started = [], time.perf_counter()
    begun = started
    for tokens in run:
        seconds = time.perf_counter() - begun
        times.append((tokens.shape[1], seconds / tokens.shape[1]))
        begun = time.perf_counter()
        if begun - started > _SECONDS and len(times) > 3:
            break
    longest = max(steps for steps, _ in times)
    return statistics.median([seconds for steps, seconds in times[1:] if steps == longest] or [times[-1][1]]), size


def errors(rule: str, length: int, at: Sequence[int]) -> list[tuple[float, float]]:
    """Return (relative error of the logits, share of equal likeliest tokens) over the 256 tokens before each place."""
    extra = {"max_length": length} if rule == "transformer" else {}
    mixer = nn.mixer_config(rule, width=64, heads=2, key_dim=32, value_dim=32, **extra)
    config = nn.ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=128)
    model = nn.CausalLM(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(256, size=(1, length)).astype(np.int32)
    found = []
    for dtype in (None, "bfloat16"):
        programs = Generator(nn.split_model(model), state_dtype=dtype).model.engine(length).programs

        def logits(parameters: Any, tokens: jax.Array, programs: Any = programs) -> jax.Array:
            def step(blocks: Any, token: jax.Array) -> tuple[Any, jax.Array]:
                out, blocks = programs.step_of(parameters, blocks, token[None])
                return blocks, out[0]

            return jax.lax.scan(step, programs.start_of(parameters, 1), tokens)[1]

        found.append(np.asarray(jax.jit(logits)(nn.split_model(model)[1], tokens[0])))
    wide, narrow = found
    rows = []
    for end in at:
        a, b = wide[max(0, end - 256) : end], narrow[max(0, end - 256) : end]
        difference = np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)
        rows.append((float(difference.mean()), float((a.argmax(-1) == b.argmax(-1)).mean())))
    return rows


def speed_page(about: dict[str, Any], quick: bool) -> list[str]:
    rounds, batches, positions = (2, (1, 2), (100, 1000)) if quick else (5, (1, 4, 16, 64), (1000, 10_000, 100_000))
    lines = ["# Tokens per second of generation", ""]
    lines += [
        f"{about['date']}, {about['cpu']}, {about['cpu_cores']} cores, load average {about['load_at_start']} at the",
        "start: other processes ran on them, so compare numbers only roughly.",
        f"jax {about['jax']}, jaxlib {about['jaxlib']}: `{about['command']}`.",
        "",
        f"Models of 4 blocks, width 256, 4 heads of 64 channels, MLP {_MLP}, vocabulary {_VOCABULARY:,}, float32.",
        f"Medians of calls of {BLOCK} steps each; of fewer where a step takes milliseconds.",
        "",
        f"## Against the batch, at position {positions[0]:,}",
        "",
        "| model | " + " | ".join(f"batch {rows}" for rows in batches) + " |",
        "| --- |" + " ---: |" * len(batches),
    ]
    for name in MODELS:
        generator = generator_of(name)
        cells = [f"{rows / step_time(generator, rows, positions[0], rounds)[0]:,.0f}" for rows in batches]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    head = " | ".join(f"position {position:,}" for position in positions)
    lines += ["", "## Against the position, of one text", "", f"| model | {head} | bytes of the state |"]
    lines.append("| --- |" + " ---: |" * (len(positions) + 1))
    for name in MODELS:
        generator = generator_of(name)
        found = [step_time(generator, 1, position, rounds) for position in positions]
        cells = [f"{1 / seconds:,.0f}" for seconds, _ in found]
        sizes = " → ".join(dict.fromkeys(f"{size:,}" for _, size in found))
        lines.append(f"| {name} | {' | '.join(cells)} | {sizes} |")
        print(lines[-1], flush=True)
    return lines + NOTES


def error_page(about: dict[str, Any], quick: bool) -> list[str]:
    length, at = (96, (32, 96)) if quick else (4096, (256, 1024, 4096))
    lines = ["# States in bfloat16: the error of the logits", ""]
    lines += [
        f"{about['date']}, {about['cpu']}; jax {about['jax']}: `{about['command']}`.",
        "",
        "Every token is a step from a state that was rounded to bfloat16 (attention: a cache in bfloat16); windows and",
        "preconditioners are float32. Models as initialised: 2 blocks, width 64, 2 heads of 32 channels; random text.",
        "The error is the mean of |difference of the logits| / |logits| (2-norms) over the 256 tokens before a place,",
        "with the share of these tokens whose most likely next token is the same.",
        "",
        "| rule | " + " | ".join(f"token {place:,}" for place in at) + " |",
        "| --- |" + " ---: |" * len(at),
    ]
    for rule in nn.RULES if not quick else ("osdn", "transformer"):
        cells = [f"{error:.1e}, {100 * same:.0f} %" for error, same in errors(rule, length, at)]
        lines.append(f"| `{rule}` | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines + [
        "",
        "Linear attention never forgets: its state grows, and what a token adds falls below the spacing of bfloat16",
        "numbers. Use float32 states for it.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from osdn_jax.compare import environment

    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.Parser(prog="python -m benchmarks.generation", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument("--only", choices=("speed", "bfloat16"), help="one of the two pages (default: both)")
    parser.add_argument("--quick", action="store_true", help="use few and small cases, to show that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results; --quick: none)")
    given = parser.parse_args(argv)
    about = environment(shlex.join(["python", "-m", "benchmarks.generation", *argv]))
    out = given.out or (None if given.quick else RESULTS)
    pages = {
        "speed": (speed_page, f"generation-{jax.default_backend()}"),
        "bfloat16": (error_page, "generation-bfloat16"),
    }
    for name, (page, file) in pages.items():
        if given.only in (None, name):
            text = "\n".join(page(about, given.quick)) + "\n"
            print(text)
            if out is not None:
                (out / f"{file}.md").write_text(text)


if __name__ == "__main__":
    command.run(main)
