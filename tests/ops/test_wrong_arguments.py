"""Errors about arguments: each names the argument, what came, and what was expected."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops.rules.state import HypergradientState

pytestmark = pytest.mark.usefixtures("our_checks")

B, T, HK, H, K, V = 2, 6, 2, 4, 8, 5


def Z(shape, dtype=np.float32):  # in NumPy, since jnp.zeros would compile a program for each shape
    return np.zeros(shape, dtype)


SEQUENCE = {"q": Z((B, T, HK, K)), "k": Z((B, T, HK, K)), "v": Z((B, T, H, V)), "beta": Z((B, T, H))}
ONE = {name: x[:, 0] for name, x in SEQUENCE.items()} | {"state": Z((B, H, K, V))}
KEYS = {"k": SEQUENCE["k"]}
GRAM = KEYS | {"log_decay": Z((B, T, HK)), "gain": Z((B, T, HK)), "center": -0.2}
SCALAR, CHANNEL = Z((B, T, H)), Z((B, T, H, K))
GATES = {"gram_log_decay": Z((B, T, HK)), "gram_gain": Z((B, T, HK))}

FUNCTIONS = {
    "delta_rule": (ops.delta_rule, SEQUENCE),
    "delta_rule_step": (ops.delta_rule_step, ONE),
    "hypergradient": (ops.hypergradient_preconditioner, KEYS | {"eta": 1.0}),
    "gram": (ops.gram_preconditioner, GRAM),
    "hypergradient_write_key": (ops.hypergradient_write_key, KEYS | {"eta": 1.0}),
    "gram_write_key": (ops.gram_write_key, GRAM),
    "squares": (ops.squares_preconditioner, KEYS),
    "squares_write_key": (ops.squares_write_key, KEYS),
    "exact": (ops.exact_gram_write_key, KEYS),
    "delta_net": (ops.delta_net, SEQUENCE),
    "gated_delta_net": (ops.gated_delta_net, SEQUENCE | {"log_decay": SCALAR}),
    "mamba2": (ops.mamba2, SEQUENCE | {"log_decay": SCALAR}),
    "kda": (ops.kda, SEQUENCE | {"log_decay": CHANNEL}),
    "gla": (ops.gla, {name: SEQUENCE[name] for name in "qkv"} | {"log_decay": CHANNEL}),
    "linear_attention": (ops.linear_attention, {name: SEQUENCE[name] for name in "qkv"}),
    "osdn": (ops.osdn, SEQUENCE),
    "os_gdn": (ops.os_gdn, SEQUENCE | {"log_decay": SCALAR}),
    "os_kda": (ops.os_kda, SEQUENCE | {"log_decay": CHANNEL}),
    "pdn": (ops.pdn, SEQUENCE | GATES),
    "pgdn": (ops.pgdn, SEQUENCE | GATES | {"log_decay": SCALAR}),
    "pkda": (ops.pkda, SEQUENCE | GATES | {"log_decay": CHANNEL}),
    "gdn2": (
        ops.gdn2,
        {name: SEQUENCE[name] for name in "qkv"}
        | {"erase_gate": CHANNEL, "write_gate": Z((B, T, H, V)), "log_decay": CHANNEL},
    ),
    "exact_pdn": (ops.exact_pdn, {name: SEQUENCE[name] for name in "qkv"}),
}
RULES = [name for name, (f, _) in FUNCTIONS.items() if "initial_state" in inspect.signature(f).parameters]
RULES.remove("delta_rule")


def fails(function, error, message, **wrong):
    f, right = FUNCTIONS[function]
    with pytest.raises(error, match=message):
        f(**right | wrong)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_arguments_are_accepted(function):
    f, right = FUNCTIONS[function]
    if function.startswith("exact"):
        with jax.enable_x64(True):
            f(**{name: jnp.zeros(x.shape, jnp.float64) for name, x in right.items()})
    else:
        jax.eval_shape(lambda: f(**right))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_name_the_argument(function):
    """For every argument of every function, under its public name."""
    f, right = FUNCTIONS[function]
    exact = function.startswith("exact")
    with jax.enable_x64(exact):
        right = float64_arguments(function) if exact else right
        for name in inspect.signature(f).parameters:
            x = right.get(name)
            wrong = [[[0.5]], "wrong"]
            if isinstance(x, np.ndarray):
                wrong += [x[0], x.astype(int)]
                if name not in ("q", "k", "v"):  # the sizes of these determine what is expected of the others
                    wrong += [np.concatenate([x, x], axis) for axis in range(x.ndim)]
            for value in wrong:
                fails(function, (TypeError, ValueError), f"^{name}: got", **right | {name: value})


def test_every_function_is_tested():
    tested = {f.__name__ for f, _ in FUNCTIONS.values()}
    assert tested == set(ops.__all__) - {"State", "hypergradient_preset"}


# Array arguments: (function, argument, its layout, a valid shape).
ARRAYS = [
    ("delta_rule", "q", "[B, T, Hk, K]", (B, T, HK, K)),
    ("delta_rule", "k", "[B, T, Hk, K] like q", (B, T, HK, K)),
    ("delta_rule", "v", "[B, T, H, V]", (B, T, H, V)),
    ("delta_rule", "beta", "[B, T, H]", (B, T, H)),
    ("delta_rule", "write_key", "[B, T, Hk or H, K]", (B, T, HK, K)),
    ("delta_rule", "log_decay", "[B, T, H] or [B, T, H, K]", (B, T, H)),
    ("delta_rule", "log_decay", "[B, T, H] or [B, T, H, K]", (B, T, H, K)),
    ("delta_rule", "initial_state", "[B, H, K, V]", (B, H, K, V)),
    ("delta_rule_step", "q", "[B, Hk, K]", (B, HK, K)),
    ("delta_rule_step", "k", "[B, Hk, K] like q", (B, HK, K)),
    ("delta_rule_step", "v", "[B, H, V]", (B, H, V)),
    ("delta_rule_step", "beta", "[B, H]", (B, H)),
    ("delta_rule_step", "write_key", "[B, Hk or H, K]", (B, H, K)),
    ("delta_rule_step", "log_decay", "[B, H] or [B, H, K]", (B, H)),
    ("hypergradient", "k", "[B, T, Hk, K]", (B, T, HK, K)),
    ("hypergradient", "beta", "[B, T, Hk], one per key head", (B, T, HK)),
    ("hypergradient", "log_forget", "[B, T, Hk]", (B, T, HK)),
    ("hypergradient", "initial", "a number, [Hk, K] or [B, Hk, K]", (HK, K)),
    ("hypergradient", "restart", "a number, [Hk, K] or [B, Hk, K]", (B, HK, K)),
    ("hypergradient", "anchor", "a number, [Hk, K] or [B, Hk, K]", (HK, K)),
    ("gram", "k", "[B, T, Hk, K]", (B, T, HK, K)),
    ("gram", "log_decay", "[B, T, Hk]", (B, T, HK)),
    ("gram", "gain", "[B, T, Hk]", (B, T, HK)),
    ("gram", "center", "[Hk] or a number", (HK,)),
    ("gram", "log_squash", "[Hk]", (HK,)),
    ("gram", "initial", "[B, Hk, K]", (B, HK, K)),
    ("squares", "k", "[B, T, Hk, K]", (B, T, HK, K)),
    ("squares", "initial", "a number, [Hk, K] or [B, Hk, K]", (HK, K)),
    ("squares", "restart", "a number, [Hk, K] or [B, Hk, K]", (B, HK, K)),
    ("gdn2", "erase_gate", "[B, T, Hk or H, K]", (B, T, H, K)),
    ("gdn2", "write_gate", "[B, T, H, V]", (B, T, H, V)),
    ("gated_delta_net", "log_decay", "[B, T, H]", (B, T, H)),
    ("mamba2", "log_decay", "[B, T, H]", (B, T, H)),
    ("kda", "log_decay", "[B, T, H, K]", (B, T, H, K)),
    ("gla", "log_decay", "[B, T, H, K]", (B, T, H, K)),
    ("os_gdn", "log_decay", "[B, T, H]", (B, T, H)),
    ("os_kda", "log_decay", "[B, T, H, K]", (B, T, H, K)),
    ("pgdn", "log_decay", "[B, T, H]", (B, T, H)),
    ("pkda", "log_decay", "[B, T, H, K]", (B, T, H, K)),
]


@pytest.mark.parametrize(("function", "name", "layout", "shape"), ARRAYS)
def test_arrays(function, name, layout, shape):
    for rank in (shape[:-1], (*shape, 1), (1,) * 6):
        if (function, name, len(rank)) in RANKS:
            continue
        fails(function, ValueError, f"^{name}: got shape {re.escape(str(rank))}, expected", **{name: Z(rank)})
    fails(function, TypeError, f"^{name}: got dtype int.*, expected a floating", **{name: Z(shape, int)})
    fails(function, TypeError, f"^{name}: got list, expected an array {re.escape(layout)}", **{name: [[0.5]]})
    fails(function, TypeError, f"^{name}: got str", **{name: "0.5"})
    if (function, name) not in FIRST:  # the sizes of these determine what is expected of the others
        for axis in range(len(shape)):
            if (function, name, axis) not in FREE:
                wrong = (*shape[:axis], shape[axis] + 3, *shape[axis + 1 :])
                fails(function, ValueError, f"^{name}: got .*, expected", **{name: Z(wrong)})


FIRST = {("delta_rule", "q"), ("delta_rule_step", "q"), ("hypergradient", "k"), ("gram", "k"), ("squares", "k")}
FREE = {("delta_rule", "v", 3), ("delta_rule_step", "v", 2)}
RANKS = {  # other ranks that are valid, too
    ("delta_rule", "log_decay", 3),
    ("delta_rule", "log_decay", 4),
    ("delta_rule_step", "log_decay", 3),
    ("hypergradient", "initial", 3),
    ("hypergradient", "restart", 2),
    ("hypergradient", "anchor", 3),
    ("squares", "initial", 3),
    ("squares", "restart", 2),
}


def test_mismatched_shapes_name_the_argument():
    def queries_and_keys(*shape):
        return {"q": Z(shape), "k": Z(shape)}

    fails("delta_rule", ValueError, "^k: ", q=Z((B, T, HK, K + 1)))
    fails("delta_rule", ValueError, "^v: got shape .* leading axes .* of q", **queries_and_keys(B, T + 1, HK, K))
    fails("delta_rule", ValueError, "^v: got 4 value heads, .* multiple of the 3 key", **queries_and_keys(B, T, 3, K))
    fails("delta_rule", ValueError, "^v: .* 0 key heads", **queries_and_keys(B, T, 0, K))
    fails("delta_rule", ValueError, "^q: got a head dimension of 0", **queries_and_keys(B, T, HK, 0))
    fails("delta_rule", ValueError, "^v: got a head dimension of 0", v=Z((B, T, H, 0)))
    fails("delta_rule", ValueError, "^write_key: got shape", write_key=Z((B, T, 3, K)))
    fails("delta_rule", ValueError, "^log_decay: got shape", log_decay=Z((B, T, H, K + 1)))
    fails("gdn2", ValueError, "^k: got shape .* like q", q=Z((B, T, H, K)))
    fails("os_gdn", ValueError, r"^beta: got .*, expected \[B, T, H\]", beta=Z((B, T, HK)))
    fails("delta_rule_step", ValueError, "^initial_state|^state", state=Z((B, H, K, V + 1)))
    fails("hypergradient", ValueError, "^beta: .*one per key head", beta=Z((B, T, H)))


def float64_arguments(function):
    return {name: np.zeros(x.shape, np.float64) for name, x in FUNCTIONS[function][1].items()}


@pytest.mark.parametrize("function", ["delta_rule", "hypergradient", "gram", *RULES])
def test_options(function):
    if function.startswith("exact"):
        return
    fails(function, TypeError, "segment_ids: got dtype float32, expected an integer", segment_ids=Z((B, T)))
    fails(function, TypeError, "segment_ids: got list", segment_ids=[[0] * T] * B)
    fails(function, ValueError, "segment_ids: got shape", segment_ids=Z((B, T + 1), int))
    fails(function, ValueError, "segment_ids: got shape", segment_ids=Z((T,), int))
    for size in (0, -64):
        fails(function, ValueError, f"chunk_size: got {size}, expected at least 1", chunk_size=size)
    for size in (64.0, "64", True):
        fails(function, TypeError, "chunk_size: got .*, expected a positive int", chunk_size=size)
    known = "chunk, mosaic_gpu, mosaic_gpu_interpret, scan, triton, triton_interpret"
    fails(function, ValueError, f"implementation: got 'fast', expected None or one of {known}", implementation="fast")
    fails(function, TypeError, "chunksize", chunksize=64)


@pytest.mark.parametrize("function", RULES)
def test_initial_states_of_rules(function):
    with jax.enable_x64(True):  # for the exact rule
        exact = float64_arguments(function) if function == "exact_pdn" else {}
        state = (Z((B, H, K, V)), None)
        fails(function, TypeError, "^initial_state: got .*, expected an ops.State", **exact, initial_state=state)
        fails(function, ValueError, "^initial_state: got shape", **exact, initial_state=Z((B, H, V, K)))
    if function not in ("exact_pdn", "osdn", "os_gdn", "os_kda", "pdn", "pgdn", "pkda"):
        fails(function, ValueError, "^initial_state: got shape", initial_state=ops.State(Z((B, H, K))))


def test_numbers():
    for scale in ("1", [1.0], jnp.ones(())):
        fails("delta_rule", TypeError, "^scale: got", scale=scale)
    fails("delta_rule", ValueError, "^scale: got inf", scale=float("inf"))
    fails("delta_rule_step", ValueError, "^scale: got nan", scale=float("nan"))
    fails("hypergradient", ValueError, "^eta: got nan, expected a finite number", eta=float("nan"))
    fails("hypergradient", TypeError, "^eta: got None", eta=None)
    fails("hypergradient", ValueError, r"^eta: got shape \(3,\), expected \[Hk\] or a number = \(2,\)", eta=Z((3,)))
    fails("osdn", ValueError, "^eta: got nan", eta=float("nan"))
    for name in ("initial", "anchor", "restart"):
        fails("hypergradient", ValueError, f"^{name}: got nan", **{name: float("nan")})
    fails("gram", ValueError, "^center: got inf", center=float("inf"))
    fails("gram", ValueError, "^squash: got 0.0, expected more than 0", squash=0)
    fails("gram", ValueError, "^squash: got -1.5", squash=-1.5)
    fails("gram", TypeError, "^squash: got None", squash=None)
    for average in (0.0, 1, -0.5, 1.5):
        fails("squares", ValueError, f"^average: got {average}, expected None or a number above 0", average=average)
    fails("squares", TypeError, "^average: got '0.9'", average="0.9")
    fails("squares", ValueError, "^normalize: got True with average=None, expected it with a mov", normalize=True)


@pytest.mark.parametrize("function", ["hypergradient", "osdn", "os_gdn", "os_kda"])
def test_bounds(function):
    fails(function, ValueError, r"^bounds: got \(1.5, 0.5\), an empty range", bounds=(1.5, 0.5))
    for bounds in ((0.5,), (0.5, 1.0, 1.5), 1.0, "ab c", {0.5, 1.5}):
        fails(function, TypeError, r"^bounds: got .*, expected a pair \(lo, hi\)", bounds=bounds)
    fails(function, TypeError, "^bounds: got None, expected a static number", bounds=(None, 1.0))
    fails(function, ValueError, "^bounds: got nan", bounds=(float("nan"), 1.0))


def test_flags():
    for value in ("no", 0, None, np.zeros(())):
        fails("delta_rule", TypeError, "^erase: got .*, expected True or False", erase=value)
        fails("delta_rule_step", TypeError, "^erase: got", erase=value)
        fails("hypergradient", TypeError, "^normalize: got", normalize=value)
        fails("os_gdn", TypeError, "^beta_aware: got", beta_aware=value)
        fails("squares", TypeError, "^normalize: got", average=0.9, normalize=value)


def test_numpy_scalars_are_numbers():
    for number in (np.int64(1), np.float32(1.0), np.float64(1.0), 1, np.array(1.0, np.float32)):
        for name in ("initial", "anchor", "restart"):
            jax.eval_shape(lambda number=number, name=name: ops.hypergradient_preconditioner(
                **KEYS, eta=np.float32(1.0), log_forget=GRAM["gain"], **{name: number}
            ))  # fmt: skip
        if number.__class__ is not np.ndarray:
            jax.eval_shape(lambda number=number: ops.gram_preconditioner(**GRAM | {"center": number}))


STATES = {
    "hypergradient": ops.State(Z((B, H, K, V)), Z((B, HK, K))),
    "plain": ops.State(Z((B, H, K, V))),
}


@pytest.mark.parametrize("function", RULES)
def test_state_of_another_batch_is_named(function):
    """The error names initial_state, which was passed, not the argument of the preconditioner."""
    if function == "exact_pdn":
        with jax.enable_x64(True):
            state = ops.exact_pdn(**float64_arguments(function))[1]
            one = jax.tree.map(lambda x: x[:1], state)
            fails(function, ValueError, "^initial_state", **float64_arguments(function), initial_state=one)
        return
    f, right = FUNCTIONS[function]
    state = jax.eval_shape(lambda: f(**right)[1])
    zeros = jax.tree.map(lambda x: Z(x.shape, x.dtype), state)
    fails(function, ValueError, "^initial_state", initial_state=jax.tree.map(lambda x: x[:1], zeros))
    fails(
        function, ValueError, "^initial_state: got shape", initial_state=zeros._replace(recurrent=zeros.recurrent[:1])
    )
    for size in (1, 3):
        wrong = jax.tree.map(lambda x, size=size: Z((size, *x.shape[1:])), zeros)
        fails(function, ValueError, "^initial_state", initial_state=wrong)


def test_state_of_another_rule_is_refused():
    states = {name: jax.eval_shape(lambda f=f, x=x: f(**x)[1]) for name, (f, x) in FUNCTIONS.items() if name in RULES
            and name != "exact_pdn"}  # fmt: skip
    zeros = {name: jax.tree.map(lambda x: Z(x.shape), state) for name, state in states.items()}
    by_feedback, by_gram = ("osdn", "os_gdn", "os_kda"), ("pdn", "pgdn", "pkda")
    for function in by_gram:
        for other in by_feedback:
            fails(
                function,
                ValueError,
                "^initial_state: got the HypergradientState of another",
                initial_state=zeros[other],
            )
    fails("osdn", ValueError, "^initial_state: got the GramState of another rule", initial_state=zeros["pdn"])
    for function in ("delta_net", "kda", "gla", "mamba2", "linear_attention", "gdn2", "gated_delta_net"):
        for other in ("osdn", "pdn"):
            fails(function, ValueError, "^initial_state: got ", initial_state=zeros[other])
        fails(function, ValueError, "^initial_state: got a preconditioner", initial_state=STATES["hypergradient"])
    for function in (*by_feedback, *by_gram):  # a State created by hand is accepted and comes back as a plain State
        f, right = FUNCTIONS[function]
        state = zeros[function]
        by_hand = jax.eval_shape(lambda f=f, right=right, s=state: f(**right, initial_state=ops.State(*s))[1])
        assert type(by_hand) is ops.State
        assert jax.tree.structure(by_hand) == jax.tree.structure(ops.State(*state))
        assert jax.tree.structure(states[function]) == jax.tree.structure(state)


def test_exact_rule_requires_float64():
    fails("exact", TypeError, "^k: got dtype float32, expected float64")
    fails("exact_pdn", TypeError, "^k: got dtype float32, expected float64")
    with jax.enable_x64(True):
        for ridge in (0.0, -1.0):
            fails(
                "exact", ValueError, "^ridge: got .*, expected more than 0", **float64_arguments("exact"), ridge=ridge
            )
        fails("exact", ValueError, "^initial: got shape", **float64_arguments("exact"), initial=jnp.zeros((B, HK, K)))
        fails("exact", ValueError, "^k: got shape", k=jnp.zeros((B, T, K)))
        with pytest.raises(ValueError, match="^segment_ids: "):
            ops.exact_pdn(**float64_arguments("exact_pdn"), segment_ids=jnp.zeros((B, T), jnp.int32))


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: got 'fast', expected one of paper, trust"):
        ops.hypergradient_preset("fast")


def test_misspelt_options_of_preconditioners():
    fails("osdn", TypeError, "log_forgot", log_forgot=SCALAR)
    fails("pdn", TypeError, "centre", centre=0.1)
    fails("hypergradient", TypeError, "bound", bound=(0.0, 1.0))


@pytest.mark.parametrize("function", [name for name in RULES if name != "exact_pdn"])
def test_wrong_tokens_are_not_reported_as_wrong_gates(function):
    """The arrays that all others are measured by come first."""
    fails(function, ValueError, r"^k: got shape \(2, 3, ", k=Z((B, 3, HK, K)))
    fails(function, ValueError, r"^v: got shape .* with the leading axes", v=Z((B, 3, H, V)))
    fails(function, ValueError, "^v: got 3 value heads, expected a multiple of the 2 key heads of q",
          q=Z((B, T, 2, K)), k=Z((B, T, 2, K)), v=Z((B, T, 3, V)))  # fmt: skip


@pytest.mark.parametrize("function", [name for name in RULES if "beta" in FUNCTIONS[name][1]])
def test_beta_is_required(function):
    fails(function, TypeError, r"^beta: got NoneType, expected an array \[B, T, H\]", beta=None)


@pytest.mark.parametrize("function", ["gated_delta_net", "os_gdn", "pgdn", "mamba2"])
def test_a_scalar_decay_has_one_shape(function):
    fails(function, ValueError, r"^log_decay: got shape \(2, 3, .*, expected \[B, T, H\] = ", log_decay=Z((B, 3, H)))


@pytest.mark.parametrize("function", ["kda", "os_kda", "pkda", "gla"])
def test_a_decay_per_channel_has_one_shape(function):
    wrong = Z((B, T, H, K + 1))
    fails(function, ValueError, r"^log_decay: got shape .*, expected \[B, T, H, K\] = ", log_decay=wrong)


def test_log_forget_has_a_row_per_preconditioner():
    fails("osdn", ValueError, r"^log_forget: got shape .*, expected \[B, T, P\] = ", log_forget=Z((B, T, H + 1)))
    fails("os_gdn", ValueError, r"^log_forget: got shape .*, expected \[B, T, P\] = ", log_forget=Z((B, T, H + 1)))


def test_a_state_with_a_preconditioner_is_refused_by_rules_without():
    zeros = HypergradientState(Z((B, H, K, V)), Z((B, HK, K)))
    fails(
        "kda",
        ValueError,
        "^initial_state: got the HypergradientState of another rule, expected the state of a rule without a precond",
        initial_state=zeros,
    )
