"""Lengths of sequences and chunks."""

import numpy as np

from benchmarks.ops.bench import Bench, Program
from benchmarks.ops.grid import DECAYS
from osdn_jax.compare import ratio


def length(b: Bench) -> None:
    """Time, memory and compile time against sequence length"""
    shapes = [b.shape(f"B1T{t}H4D128", f"B1T{t // 128}H2D8") for t in (1024, 4096, 16384)]
    rules = ("delta_net", "gated_delta_net", "kda", "osdn")
    for rule in rules[: 1 if b.quick else None]:
        short, middle, long = b.run([Program(rule, shape) for shape in shapes])
        value = ratio(long.seconds, middle.seconds)
        b.figure(f"{rule}, forward + backward: time of T = {shapes[2].length} / {shapes[1].length}", value, at_most=4.4)
        compiling = [c.compile_seconds or np.nan for c in (short, long)]
        b.figure(f"{rule}: compile time of T = {shapes[2].length} / {shapes[0].length}", compiling[1] / compiling[0])


def chunks(b: Bench) -> None:
    """Chunk length, forward + backward: the source of `selection.default_chunk`"""
    sizes = ("B1T2048H4D64", "B1T2048H4D128", "B4T2048H4D128")
    chunk_sizes = (16, 32, 64, 128)
    for decay, rule in DECAYS.items():
        for text in sizes[: 1 if b.quick else None]:
            shape = b.shape(text, "B1T16H2D8")
            programs = [Program(rule, shape, "chunk", chunk_size=c) for c in ((8, 16) if b.quick else chunk_sizes)]
            timed = b.run(programs, repeats=5)
            best = min(range(len(timed)), key=lambda i: np.median(timed[i].seconds))
            for p, c in zip(programs, timed, strict=True):
                value = ratio(c.seconds, timed[best].seconds)
                b.figure(f"decay {decay}, {shape}: time of C = {p.chunk_size} / the best of these", value)
