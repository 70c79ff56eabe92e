"""The rules against each other, against the scan, and in bfloat16."""

from benchmarks.ops.bench import Bench, Program, memory, passes
from benchmarks.ops.models import gradient_of_model
from osdn_jax.compare import ratio

SHAPES = ("B8T256H2D64", "B1T4096H4D128", "B16T512H8D64", "B1T2048H4D64")
# Each rule, the rule that it is measured against, and the most that it may take of its time, forward + backward and
# forward alone. Preconditioners that use beta may take more: they have a state for each value head.
PAIRS = (
    ("kda", "gated_delta_net", 1.3, None),
    ("osdn", "delta_net", 1.1, 1.15),
    ("osdn_trust", "delta_net", 1.1, 1.15),
    ("pdn", "delta_net", 1.1, 1.15),
    ("os_gdn", "gated_delta_net", 1.15, 1.15),
    ("os_gdn_trust", "gated_delta_net", 1.15, 1.15),
    ("pgdn", "gated_delta_net", 1.1, 1.15),
    ("os_kda_trust", "kda", 1.15, 1.15),
    ("pkda", "kda", 1.1, 1.15),
)
_NOISE = 0.05  # of a ratio of two programs that cost the same


def auto_against_scan(b: Bench) -> None:
    """Cost of implementation=None relative to the scan"""
    shape = b.shape("B1T4096H4D128", "B1T16H2D8")
    for rule in ("delta_net", "gated_delta_net"):
        scan, auto = b.run([Program(rule, shape, name, gradient=False) for name in ("scan", "auto")])
        b.figure(f"{rule}, forward: time of auto / scan", ratio(auto.seconds, scan.seconds), at_most=1.05)
        scan, auto = b.run([Program(rule, shape, name) for name in ("scan", "auto")])
        speed, share = ratio(scan.seconds, auto.seconds), memory(auto, scan)
        if rule == "delta_net":
            b.figure(f"{rule}, forward + backward: time of scan / auto", speed, at_least=8)
            b.figure(f"{rule}, forward + backward: temporary memory of auto / scan", share, at_most=1 / 20)
        else:
            b.figure(f"{rule}, forward + backward: time of auto / scan", 1 / speed, at_most=0.09)
            b.figure(f"{rule}, forward + backward: temporary memory of auto / scan", share, at_most=0.04)


def rules_against_each_other(b: Bench) -> None:
    """Cost of channel decay and of the preconditioners"""
    names = list(dict.fromkeys(name for new, old, *_ in PAIRS for name in (old, new)))
    for text in SHAPES[: 1 if b.quick else None]:
        shape = b.shape(text, "B1T16H2D8")
        for gradient in (True, False):
            timed = dict(zip(names, b.run([Program(n, shape, gradient=gradient) for n in names]), strict=True))
            for new, old, *most in PAIRS:
                value = ratio(timed[new].seconds, timed[old].seconds)
                target = most[0 if gradient else 1]
                b.figure(f"{shape}, {passes(gradient)}: time of {new} / {old}", value, at_most=target)


def parts_of_rules(b: Bench) -> None:
    """Cost of projecting the preconditioner at every token, and of scores without sub-blocks"""
    shape = b.shape("B1T4096H4D128", "B1T16H2D8")
    # Forgetting toward 0 in the trust region holds d at its lower bound: it is projected at almost every token.
    for implementation in ("auto", "chunk"):
        pair = [Program("delta_net", shape, implementation), Program("osdn_trust", shape, implementation, anchor=0.0)]
        plain, bound = b.run(pair)
        value = ratio(bound.seconds, plain.seconds)
        b.figure(f"{implementation}: time of osdn_trust at its lower bound / delta_net", value)
    for tokens in (8,) if b.quick else (32, 64):
        pair = [Program("kda", shape, "chunk", chunk_size=tokens, direct_scores=direct) for direct in (False, True)]
        ours, direct = b.run(pair, repeats=3)
        b.figure(
            f"kda in chunks of {tokens}: time of direct C x C x K / sub-blocks", ratio(direct.seconds, ours.seconds)
        )


def bfloat16(b: Bench) -> None:
    """Time of bfloat16 relative to float32; the target is 1, and 0.05 is allowed for noise"""
    types = ("float32", "bfloat16")
    for text in SHAPES[: 1 if b.quick else 2]:
        shape = b.shape(text, "B1T16H2D8")
        for rule in ("delta_net", "gated_delta_net", "kda", "osdn")[: 1 if b.quick else None]:
            for gradient in (True, False):
                wide, narrow = b.run([Program(rule, shape, gradient=gradient, dtype=dtype) for dtype in types])
                value = ratio(narrow.seconds, wide.seconds)
                b.figure(f"{rule}, {shape}, {passes(gradient)}", value, at_most=1 + _NOISE)
    batch, tokens, width = (2, 16, 8) if b.quick else (8, 256, 128)
    for rule in ("osdn", "gated_delta_net", "transformer")[: 1 if b.quick else None]:
        wide, narrow = b.time([gradient_of_model(rule, batch, tokens, width, dtype=dtype) for dtype in types])
        value = ratio(narrow.seconds, wide.seconds)
        b.figure(f"gradient of a model of {rule}, {batch} x {tokens}", value, at_most=1 + _NOISE)
