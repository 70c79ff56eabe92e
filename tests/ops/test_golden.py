"""Every rule against float64 outputs and gradients of independent implementations (OSDN_GOLDEN_DIR)."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, value_and_gradient

_DIRECTORY = os.environ.get("OSDN_GOLDEN_DIR")
_CASES = json.loads((Path(_DIRECTORY) / "rules" / "manifest.json").read_text()) if _DIRECTORY else []

pytestmark = [
    pytest.mark.skipif(not _DIRECTORY, reason="OSDN_GOLDEN_DIR is not set: no golden data to compare with"),
    pytest.mark.usefixtures("float64"),
]


def _unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _hypergradient(rule, x, options, run):
    beta_aware = rule == "os_gdn" or options.get("beta_aware", False)
    bounds = None if options["d_min"] is None else (options["d_min"], options["d_max"])
    decay = {"osdn": {}, "os_gdn": {"log_decay": "g"}, "os_kda": {"log_decay": "gk"}}[rule]
    return getattr(ops, rule)(
        x["q"],
        x["k"],
        x["v"],
        beta=x["beta"],
        **{name: x[key] for name, key in decay.items()},
        eta=options["eta"],
        log_forget=x.get("gd"),
        initial=x["d0"],
        bounds=bounds,
        normalize=options.get("use_denominator", False),
        beta_aware=beta_aware,
        **run,
    )


def _rule(rule, x, options, run):
    state = ops.State(x["h0"], x.get("A0"))
    run = {"initial_state": state, **run}
    q, k, v = x["q"], x["k"], x["v"]
    gram = {"gram_log_decay": x.get("ga"), "gram_gain": x.get("ba"), "center": x.get("c")}
    match rule:
        case "delta_net":
            return ops.delta_net(q, k, v, beta=x["beta"], **run)
        case "gated_delta_net":
            return ops.gated_delta_net(q, k, v, beta=x["beta"], log_decay=x["g"], **run)
        case "kda":
            return ops.kda(q, k, v, beta=x["beta"], log_decay=x["gk"], **run)
        case "gdn2":
            return ops.gdn2(q, k, v, erase_gate=x["be"], write_gate=x["wv"], log_decay=x["gk"], **run)
        case "gla":
            return ops.gla(q, k, v, log_decay=x["gk"], **run)
        case "simple_gla":
            return ops.mamba2(q, k, v, beta=jnp.ones(v.shape[:3], v.dtype), log_decay=x["g"], **run)
        case "osdn" | "os_gdn" | "os_kda":
            return _hypergradient(rule, x, options, run)
        case "pdn" | "pgdn":
            decay = {"log_decay": x["g"]} if rule == "pgdn" else {}
            return getattr(ops, rule)(_unit(q), _unit(k), v, beta=x["beta"], **decay, **gram, **run)
        case "pkda":
            return ops.pkda(q, k, v, beta=x["beta"], log_decay=x["gk"], **gram, **run)


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case["file"].removesuffix(".npz"))
def test_rule_equals_golden(case):
    """Values and gradients of the scan, and values of the chunks on long inputs; test_cases.py compares the two."""
    rule, options = case["rule"], case["options"]
    data = np.load(Path(_DIRECTORY) / "rules" / case["file"])

    def arrays(prefix):
        return {name.removeprefix(prefix): data[name] for name in data.files if name.startswith(prefix)}

    def outputs(x, implementation):
        o, state = _rule(rule, x, options, {"implementation": implementation, "chunk_size": 16})
        out = {"o": o, "state": state.recurrent, "d_final": state.preconditioner, "A_final": state.preconditioner}
        return {name: out[name] for name in arrays("out_")}

    x, cotangents = jax.tree.map(jnp.asarray, (arrays("in_"), arrays("cot_")))
    tolerance = 1e-7 if rule in ("pdn", "pgdn") else 1e-9  # these two references round log(squash) to float32
    got = jit(value_and_gradient(functools.partial(outputs, implementation="scan")))(x, cotangents)
    assert_close(got, (arrays("out_"), arrays("grad_")), tolerance)
    if case["dims"]["T"] > 64:
        assert_close(jit(functools.partial(outputs, implementation="chunk"))(x), arrays("out_"), tolerance)
