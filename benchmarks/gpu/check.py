"""A kernel against the float32 scan on the same rounded inputs: values, gradients, and the same bits twice."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from osdn_jax import ops
from osdn_jax.comparison import Shape, draw_cotangents, draw_inputs, value_and_gradient
from osdn_jax.comparison.inputs import Arrays
from osdn_jax.comparison.measure import relative_error
from osdn_jax.ops import gram, hypergradient

KEYS = ("random", "near-parallel")
LIMIT, GATE_LIMIT = 1e-2, 2e-2
GATES = ("d_beta", "d_log_decay", "d_log_forget", "d_gain", "d_center")
_RULES = {None: "delta_net", "scalar": "gated_delta_net", "channel": "kda"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the delta rule, or with a preset of a preconditioner: of the hypergradient one's, or "gram"."""

    decay: str | None = None
    batch: int = 2
    length: int = 400  # not a multiple of a chunk
    heads: int = 4
    key_heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    write_key: bool = False
    documents: bool = False
    erase: bool = True
    strong: bool = False  # a third of the decays is 1, a third e^-20
    preset: str | None = None
    beta_aware: bool = False
    multiply: bool = False  # a preconditioner's write keys, as the rules take them, and not its multipliers

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.length, self.heads, self.key_heads, self.key_dim, self.value_dim)


def _square(dim: int, **rest: Any) -> Case:
    return Case(key_dim=dim, value_dim=dim, **rest)


CASES = {
    "no decay": Case(),
    "scalar decay": Case("scalar"),
    "channel decay": Case("channel"),
    "no decay, write key": Case(write_key=True),
    "scalar decay, write key, documents": Case("scalar", write_key=True, documents=True),
    "channel decay, write key, documents": Case("channel", write_key=True, documents=True),
    "scalar decay, 2 key heads, write key": Case("scalar", key_heads=2, write_key=True),
    "channel decay, 2 key heads": Case("channel", key_heads=2),
    "scalar decay, no erasing": Case("scalar", erase=False),
    "channel decay, no erasing": Case("channel", erase=False),
    "scalar decay of 0 and -20": Case("scalar", strong=True),
    "channel decay of 0 and -20": Case("channel", strong=True),
    "scalar decay, D 64": _square(64, decay="scalar"),
    "channel decay, D 64, documents": _square(64, decay="channel", documents=True),
    "scalar decay, D 256, write key": _square(256, batch=1, decay="scalar", write_key=True),
    "channel decay, D 256": _square(256, batch=1, decay="channel"),
    "hypergradient, paper": Case(preset="paper"),
    "hypergradient, trust, beta, documents": Case(preset="trust", beta_aware=True, documents=True),
    "hypergradient, paper, write keys": Case(preset="paper", multiply=True),
    "Gram, documents": Case(preset="gram", documents=True),
    "Gram, write keys": Case(preset="gram", multiply=True),
}
_TINY: dict[str, Any] = {"batch": 1, "length": 40, "heads": 1, "key_heads": 1}
DRY_CASES = {
    "scalar decay, tiny": _square(64, decay="scalar", **_TINY),
    "hypergradient, trust, tiny": _square(64, preset="trust", **_TINY),
    "Gram, tiny": _square(64, preset="gram", **_TINY),
}


def draw(case: Case, keys: str, seed: int) -> tuple[Arrays, np.ndarray | None]:
    """NumPy arguments, q, k, v and write keys rounded to bfloat16, and the documents' ids or None."""
    rng = np.random.default_rng([seed, KEYS.index(keys)])
    presets = {"paper": "osdn", "trust": "osdn_trust", "gram": "pdn"}
    rule = presets[case.preset] if case.preset else _RULES[case.decay]
    x = draw_inputs(rule, case.shape, "bfloat16", int(rng.integers(2**31)))
    if keys == "near-parallel":
        common = rng.normal(size=(case.batch, 1, case.key_heads, case.key_dim))
        near = common + 0.01 * rng.normal(size=x["k"].shape)
        x["k"] = (near / np.linalg.norm(near, axis=-1, keepdims=True)).astype(x["k"].dtype)
        x["beta"] = np.full_like(x["beta"], 0.95)
    if case.strong:
        kind = rng.integers(3, size=x["log_decay"].shape)
        x["log_decay"] = np.select([kind == 0, kind == 1], [0.0, -20.0], x["log_decay"]).astype(np.float32)
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


def outputs(case: Case, x: Arrays, segment_ids: jax.Array | None, implementation: str) -> dict[str, jax.Array]:
    """The case's outputs by name."""
    options: dict[str, Any] = {"segment_ids": segment_ids, "implementation": implementation}
    if case.preset is None:
        o, memory = ops.delta_rule(**x, erase=case.erase, **options)
        return {"o": o, "memory": memory}
    if case.preset == "gram":
        out, final = gram.preconditioned(**x, multiply=case.multiply, **options)
        return {"multiplier": out, "final": final}
    preset = {name: value for name, value in ops.hypergradient_preset(case.preset).items() if name != "initial"}
    anchor = 1.0 if case.preset == "trust" else 0.0
    out, final = hypergradient.preconditioned(**x, **preset, anchor=anchor, multiply=case.multiply, **options)
    return {"multiplier": out, "final": final}


def both(case: Case, implementation: str) -> Callable[..., dict[str, np.ndarray]]:
    """(arguments, ids, cotangents) -> outputs, and gradients as d_ARGUMENT; compiled once."""

    @jax.jit
    def run(x: Arrays, ids: jax.Array | None, cotangents: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        return value_and_gradient(lambda y: outputs(case, y, ids, implementation))(x, cotangents)

    def by_name(x: Arrays, ids: np.ndarray | None, cotangents: Arrays) -> dict[str, np.ndarray]:
        values, gradients = run(x, ids, cotangents)
        named = {**values, **{f"d_{name}": g for name, g in gradients.items()}}
        return {name: np.asarray(value) for name, value in named.items()}

    return by_name


def judge(errors: dict[str, float]) -> dict[str, Any]:
    """The error that uses most of its limit, and whether all keep theirs."""
    limits = {name: GATE_LIMIT if name in GATES else LIMIT for name in errors}
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    kept = all(errors[name] <= limits[name] for name in errors)
    return {"worst": worst, "error": errors[worst], "limit": limits[worst], "kept": kept}


def compare(case: Case, keys: str, seeds: int, kernel: Callable, scan: Callable) -> dict[str, Any]:
    """Errors of `both` by a kernel, each the largest over the seeds, and whether two runs gave the same bits."""
    errors: dict[str, float] = {}
    same, start = True, time.perf_counter()
    for seed in range(seeds):
        arrays, ids = draw(case, keys, seed)
        shapes = jax.eval_shape(lambda x, i: outputs(case, x, i, "scan"), arrays, ids)
        cotangents = draw_cotangents(shapes, "bfloat16", seed)
        first, again = (kernel(arrays, ids, cotangents) for _ in range(2))
        same = same and all(first[name].tobytes() == again[name].tobytes() for name in first)
        with jax.default_matmul_precision("highest"):
            expected = scan(_float32(arrays), ids, _float32(cotangents))
        for name, want in expected.items():
            errors[name] = max(errors.get(name, 0.0), relative_error(first[name], want.astype(np.float64)))
    verdict = judge(errors)
    status = "pass" if verdict.pop("kept") and same else "fail"
    seconds = round(time.perf_counter() - start, 1)
    return {"status": status, **verdict, "same": same, "errors": errors, "seeds": seeds, "seconds": seconds}


def job(spec: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """A row for each kind of keys."""
    case = (DRY_CASES if spec["dry"] else CASES)[spec["case"]]
    kernel, scan = both(case, spec["implementation"]), both(case, "scan")
    for keys in KEYS:
        key = {"section": "check", "case": spec["case"], "keys": keys}
        known = (gram if case.preset == "gram" else hypergradient).IMPLEMENTATIONS
        if case.preset and spec["implementation"] not in known:
            reason = f"the preconditioner has no implementation {spec['implementation']!r}"
            emit({**key, "status": "absent", "reason": reason})
            continue
        try:
            emit({**key, **compare(case, keys, spec["seeds"], kernel, scan)})
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result
            emit({**key, "status": "raised", "reason": words(error)})


def words(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split()) or "without a message"
    return f"{type(error).__name__}: {text[:400]}"


def _float32(arrays: Arrays) -> Arrays:
    return {name: x.astype(np.float32) for name, x in arrays.items()}
