"""The cases of the checks and their inputs: every kernel, and every path through one that inputs decide."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax import ops
from osdn_jax.compare import Shape, draw_inputs
from osdn_jax.compare.inputs import Arrays

KEYS = ("random", "near-parallel")
# With this step size and these bounds, peaked keys leave the bounds in some chunks, come close in others, and stay far
# from them in the rest: see _peaked.
BINDING: dict[str, Any] = {"eta": 1.0, "bounds": (2 / 3, 3 / 2)}

_RULES = {None: "delta_net", "scalar": "gated_delta_net", "channel": "kda"}
_PRESETS = {"paper": "osdn", "trust": "osdn_trust", "binding": "osdn_trust", "gram": "pdn"}
_NARROW = ("q", "k", "v", "write_key")  # in the type of the case; gates, states and preconditioners are float32


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the delta rule, or, with `preset`, of a preconditioner: a hypergradient preset, or "gram"."""

    decay: str | None = None
    batch: int = 2
    length: int = 400  # not a multiple of a chunk
    heads: int = 4
    key_heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    write_key: bool = False
    documents: bool = False
    erase: bool = True
    strong: bool = False  # a third of the decays are 1, a third e^-20
    preset: str | None = None
    beta_aware: bool = False
    multiply: bool = False  # return a preconditioner's write keys instead of its multipliers
    gradient: bool = True
    judge: str = "scan"  # the reference: in float32, or "numpy", a float64 loop that shares nothing with the package
    seeds: int = 3

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.length, self.heads, self.key_heads, self.key_dim, self.value_dim)

    @property
    def families(self) -> tuple[str, ...]:
        """Groups of kernels that it runs: if one of them hangs, the case hangs too."""
        if self.preset == "gram":
            return ("Gram",)
        if self.preset is None:
            return (f"{self.decay or 'no'} decay",)
        fallback = self.documents or self.preset == "binding"
        return ("hypergradient", *(["hypergradient, sequential fallback"] if fallback else []))


def _square(dim: int, **rest: Any) -> Case:
    return Case(key_dim=dim, value_dim=dim, **rest)


def _heads(batch: int, heads: int, length: int, **rest: Any) -> Case:
    return Case(batch=batch, heads=heads, key_heads=heads, length=length, **rest)


CASES = {
    "no decay": Case(),
    "scalar decay": Case("scalar"),
    "channel decay": Case("channel"),
    "scalar decay, judged by NumPy": _heads(1, 2, 200, decay="scalar", write_key=True, judge="numpy"),
    "channel decay, judged by NumPy": _heads(1, 2, 200, decay="channel", judge="numpy"),
    "no decay, write key": Case(write_key=True),
    "scalar decay, write key, documents": Case("scalar", write_key=True, documents=True),
    "channel decay, write key, documents": Case("channel", write_key=True, documents=True),
    "scalar decay, 2 key heads, write key": Case("scalar", key_heads=2, write_key=True),
    "channel decay, 2 key heads": Case("channel", key_heads=2),
    "scalar decay, no erasing": Case("scalar", erase=False),
    "channel decay, no erasing": Case("channel", erase=False),
    "scalar decay of 0 and -20": Case("scalar", strong=True),
    "channel decay of 0 and -20": Case("channel", strong=True),
    "scalar decay, float16": Case("scalar", dtype="float16"),
    "channel decay, float16, documents": Case("channel", dtype="float16", documents=True),
    "scalar decay, D 64": _square(64, decay="scalar"),
    "channel decay, D 64, documents": _square(64, decay="channel", documents=True),
    "scalar decay, K 64 V 128": Case("scalar", key_dim=64),
    "channel decay, K 128 V 64": Case("channel", value_dim=64),
    "no decay, K 256 V 64, write key": Case(key_dim=256, value_dim=64, write_key=True),
    "scalar decay, K 64 V 256": Case("scalar", key_dim=64, value_dim=256),
    "scalar decay, D 256, write key": _square(256, batch=1, decay="scalar", write_key=True),
    "channel decay, D 256": _square(256, batch=1, decay="channel"),
    # Few heads and a long sequence, which the kernels split.
    "scalar decay, B1 H2 T4096": _heads(1, 2, 4096, decay="scalar", seeds=1),
    "channel decay, B1 H2 T4096, documents": _heads(1, 2, 4096, decay="channel", documents=True, seeds=1),
    # More thread blocks than fit on the GPU at once: of the stages that work chunk by chunk, then of the scans too.
    "scalar decay, B4 H16 T2000": _heads(4, 16, 2000, decay="scalar", seeds=1),
    "channel decay, B4 H80 T200": _heads(4, 80, 200, decay="channel", seeds=1),
    "scalar decay, T 1": Case("scalar", length=1),
    "channel decay, T 1, write key": Case("channel", length=1, write_key=True),
    "hypergradient, paper": Case(preset="paper"),
    "hypergradient, trust, beta, documents": Case(preset="trust", beta_aware=True, documents=True),
    "hypergradient, paper, write keys": Case(preset="paper", multiply=True),
    "hypergradient, bounds that bind": Case(preset="binding", beta_aware=True),
    "hypergradient, bounds that bind, write keys": Case(preset="binding", beta_aware=True, multiply=True),
    "hypergradient, float16, write keys": Case(preset="trust", beta_aware=True, dtype="float16", multiply=True),
    "hypergradient, D 256, write keys": _square(256, preset="trust", beta_aware=True, multiply=True),
    "hypergradient, B4 H80 T200": _heads(4, 80, 200, preset="binding", beta_aware=True, seeds=1),
    "hypergradient, T 1": Case(preset="paper", length=1),
    "Gram, documents": Case(preset="gram", documents=True),
    "Gram, write keys": Case(preset="gram", multiply=True),
    "Gram, float16, write keys": Case(preset="gram", dtype="float16", multiply=True),
    "Gram, B4 H80 T200": _heads(4, 80, 200, preset="gram", seeds=1),
    "Gram, T 1": Case(preset="gram", length=1),
}
# Types and head dimensions that the Triton kernels serve and those for Hopper do not; sizes between theirs are padded.
TRITON_CASES = {
    "no decay, float32, D 64, write key": _square(64, dtype="float32", write_key=True),
    "scalar decay, float32, documents": Case("scalar", dtype="float32", documents=True),
    "channel decay, float32": Case("channel", dtype="float32"),
    "scalar decay, float32, D 256": _square(256, batch=1, decay="scalar", dtype="float32"),
    "scalar decay, D 32": _square(32, decay="scalar"),
    "channel decay, D 32, write key, documents": _square(32, decay="channel", write_key=True, documents=True),
    "no decay, K 32 V 256": Case(key_dim=32, value_dim=256),
    "scalar decay, K 48 V 96": Case("scalar", key_dim=48, value_dim=96),
    "hypergradient, float32, write keys": Case(preset="trust", beta_aware=True, dtype="float32", multiply=True),
    "hypergradient, D 32, bounds that bind": _square(32, preset="binding", beta_aware=True),
    "Gram, float32, write keys": Case(preset="gram", dtype="float32", multiply=True),
    "Gram, D 32, documents": _square(32, preset="gram", documents=True),
}
_TINY: dict[str, Any] = {"batch": 1, "length": 40, "heads": 1, "key_heads": 1}
DRY_CASES = {
    "scalar decay, tiny": _square(64, decay="scalar", **_TINY),
    "channel decay, tiny, judged by NumPy": _square(64, decay="channel", judge="numpy", **_TINY),
    "hypergradient, trust, tiny": _square(64, preset="trust", **_TINY),
    "Gram, tiny": _square(64, preset="gram", **_TINY),
}
DRY_TRITON_CASES = {
    "scalar decay, float32, tiny": _square(32, decay="scalar", dtype="float32", **_TINY),
    "hypergradient, float32, tiny": _square(32, preset="trust", dtype="float32", **_TINY),
    "Gram, float32, tiny": _square(32, preset="gram", dtype="float32", **_TINY),
}


def _smoke(**sizes: Any) -> dict[str, Case]:
    """Return cases that run every kernel once: those of a forward pass, and those that a gradient adds."""
    calls: dict[str, dict[str, Any]] = {
        "no decay": {},
        "scalar decay": {"decay": "scalar"},
        "channel decay": {"decay": "channel"},
        "hypergradient": {"preset": "paper", "multiply": True},
        "hypergradient, sequential fallback": {"preset": "binding", "beta_aware": True, "heads": 4, "key_heads": 4},
        "Gram": {"preset": "gram", "multiply": True},
    }
    return {
        f"{name}, {'gradient' if gradient else 'forward'}": Case(**(sizes | call), gradient=gradient, seeds=1)
        for name, call in calls.items()
        for gradient in (False, True)
    }


SMOKE = _smoke(batch=1, length=128, heads=4, key_heads=4)
DRY_SMOKE = _smoke(**_TINY, key_dim=64, value_dim=64)


def is_triton(implementation: str) -> bool:
    """Return True for the Triton kernels, on a GPU or in their interpreter."""
    return implementation in ("triton", "triton_interpret")


def cases_of(section: str, dry: bool, implementation: str = "") -> dict[str, Case]:
    """Return the cases of a section, "smoke" or "check", by name."""
    if section == "smoke":
        return DRY_SMOKE if dry else SMOKE
    more = (TRITON_CASES, DRY_TRITON_CASES)[dry] if is_triton(implementation) else {}
    return {**(CASES, DRY_CASES)[dry], **more}


def draw(case: Case, keys: str, seed: int) -> tuple[Arrays, np.ndarray | None]:
    """Return NumPy arguments, q, k, v and write keys rounded to the case's type, and segment_ids or None."""
    rng = np.random.default_rng([seed, KEYS.index(keys)])
    rule = _PRESETS[case.preset] if case.preset else _RULES[case.decay]
    drawn = draw_inputs(rule, case.shape, "float32", int(rng.integers(2**31)))
    x = {name: a.astype(jnp.dtype(case.dtype) if name in _NARROW else a.dtype) for name, a in drawn.items()}
    if case.preset == "binding":
        k, x["beta"] = _peaked(rng, case, keys)
        x["k"] = k.astype(x["k"].dtype)
    elif keys == "near-parallel":
        common = rng.normal(size=(case.batch, 1, case.key_heads, case.key_dim))
        near = common + 0.01 * rng.normal(size=x["k"].shape)
        x["k"] = (near / np.linalg.norm(near, axis=-1, keepdims=True)).astype(x["k"].dtype)
        x["beta"] = np.full_like(x["beta"], 0.95)
    if case.strong:
        choice = rng.integers(3, size=x["log_decay"].shape)
        x["log_decay"] = np.select([choice == 0, choice == 1], [0.0, -20.0], x["log_decay"]).astype(np.float32)
    if case.write_key:
        scale = rng.uniform(2 / 3, 3 / 2, size=x["k"].shape)
        x["write_key"] = (scale * x["k"].astype(np.float64)).astype(x["k"].dtype)
    if case.preset == "gram":
        x = {"k": x["k"], "center": x["center"], "log_decay": x["gram_log_decay"], "gain": x["gram_gain"]}
    elif case.preset:
        names = ("k", "beta", "log_forget", "initial") if case.beta_aware else ("k", "log_forget", "initial")
        x = {name: x[name] for name in names}
    starts = rng.uniform(size=(case.batch, case.length)) < 5 / case.length
    return x, np.cumsum(starts, axis=1, dtype=np.int32) if case.documents else None


def _peaked(rng: np.random.Generator, case: Case, keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Return keys with most of their norm in one of four channels, and beta [B, T, H]; head h has type h mod 4.

    The preconditioner of a peaked channel converges to beta <d, k^2> = 1 on average. For heads of type 1 that is inside
    the bounds, but the positive updates of a chunk sum to more than the room to the bound, so the values of the chunk
    are formed, tested and kept. For type 2 it is near the upper bound, and some chunks use the sequential fallback; for
    type 3 it is below the lower bound, and all do. Heads of type 0 have ordinary keys, far from both bounds.
    """
    shape = (case.batch, case.length, case.key_heads)
    head_type = np.arange(case.key_heads) % 4
    hot = rng.integers(4, size=shape if keys == "random" else (case.batch, 1, case.key_heads))
    k = np.broadcast_to(np.eye(case.key_dim)[hot], (*shape, case.key_dim)).copy()
    k *= np.where(rng.uniform(size=(*k.shape[:-1], 1)) < 0.5, -1, 1) if keys == "random" else 1
    k += 0.02 * rng.normal(size=k.shape)
    plain = rng.normal(size=k.shape if keys == "random" else (case.batch, 1, *k.shape[2:]))
    k = np.where((head_type == 0)[:, None], plain + 0.01 * rng.normal(size=k.shape), k)
    k *= np.where(head_type == 3, 1.4, 1.0)[:, None] / np.linalg.norm(k, axis=-1, keepdims=True)
    low = np.array([0.9, 0.7, 0.55, 0.8])[head_type]
    return k, rng.uniform(low, 1.0, size=shape).astype(np.float32)


def outputs(case: Case, x: Arrays, segment_ids: jax.Array | None, implementation: str) -> dict[str, jax.Array]:
    """Return the outputs of a case by name."""
    options: dict[str, Any] = {"segment_ids": segment_ids, "implementation": implementation}
    if case.preset is None:
        o, state = ops.delta_rule(**x, erase=case.erase, **options)
        return {"o": o, "state": state}
    if case.preset == "gram":
        by_gram = ops.gram_write_key if case.multiply else ops.gram_preconditioner
        out, final = by_gram(**x, **options)
        return {"multiplier": out, "final": final}
    preset = BINDING if case.preset == "binding" else ops.hypergradient_preset(case.preset)
    preset = {name: value for name, value in preset.items() if name != "initial"}
    anchor = 0.0 if case.preset == "paper" else 1.0
    by_hypergradient = ops.hypergradient_write_key if case.multiply else ops.hypergradient_preconditioner
    out, final = by_hypergradient(**x, **preset, anchor=anchor, **options)
    return {"multiplier": out, "final": final}
