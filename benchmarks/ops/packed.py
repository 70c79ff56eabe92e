"""The check that contains packed documents that are not finite."""

from benchmarks.ops.bench import Bench, Program, memory
from benchmarks.ops.models import gradient_of_model
from osdn_jax.compare import ratio


def packed(b: Bench) -> None:
    """Cost of the check that contains packed documents that are not finite, forward + backward"""
    for text in ("B8T256H2D64", "B1T4096H4D128", "B4T512H8D64")[: 1 if b.quick else None]:
        shape = b.shape(text, "B2T16H2D8")
        for rule in ("delta_net", "os_gdn_trust", "pdn"):
            plain, kept = b.run([Program(rule, shape, packed=True, checked=checked) for checked in (False, True)])
            b.figure(f"{rule}, {shape}: time of checked / unchecked", ratio(kept.seconds, plain.seconds))
            b.figure(f"{rule}, {shape}: temporary memory of checked / unchecked", memory(kept, plain))
    sizes = ((2, 16, 8),) if b.quick else ((8, 256, 128), (4, 1024, 128))
    for batch, tokens, width in sizes:
        for rule in ("delta_net", "osdn", "os_gdn", "transformer"):
            pair = [gradient_of_model(rule, batch, tokens, width, checked=checked) for checked in (False, True)]
            plain, kept = b.time(pair)
            value = ratio(kept.seconds, plain.seconds)
            b.figure(f"gradient of a model of {rule}, {batch} x {tokens}: time of checked / unchecked", value)
