"""Signatures and docstrings of the public functions, and initial states as a caller passes them."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit

B, T, HK, H, K, V = 2, 5, 1, 2, 3, 4
SHARED = {"initial_state", "scale", "segment_ids", "chunk_size", "implementation", "context_axis"}
HYPERGRADIENT = {"eta", "log_forget", "initial", "anchor", "bounds", "normalize", "beta_aware"}
GRAM = {"gram_log_decay", "gram_gain", "center", "squash"}
KEYWORDS = {
    "delta_net": {"beta"},
    "gated_delta_net": {"beta", "log_decay"},
    "kda": {"beta", "log_decay"},
    "gdn2": {"erase_gate", "write_gate", "log_decay"},
    "linear_attention": set(),
    "mamba2": {"beta", "log_decay"},
    "gla": {"log_decay"},
    "osdn": {"beta"} | HYPERGRADIENT,
    "os_gdn": {"beta", "log_decay"} | HYPERGRADIENT,
    "os_kda": {"beta", "log_decay"} | HYPERGRADIENT,
    "pdn": {"beta"} | GRAM,
    "pgdn": {"beta", "log_decay"} | GRAM,
    "pkda": {"beta", "log_decay"} | GRAM,
    "exact_pdn": {"ridge"},
}


def arrays(rule):
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), jnp.float32)
    gate, channels = (B, T, H), (B, T, H, K)
    shapes = {
        "beta": gate,
        "log_decay": channels if rule in ("kda", "gdn2", "gla", "os_kda", "pkda") else gate,
        "erase_gate": (B, T, HK, K),
        "write_gate": (B, T, H, V),
        "gram_log_decay": (B, T, HK),
        "gram_gain": (B, T, HK),
    }
    x = {"q": uniform(B, T, HK, K), "k": uniform(B, T, HK, K), "v": uniform(B, T, H, V)}
    x |= {name: uniform(*shapes[name]) for name in sorted(KEYWORDS[rule]) if name in shapes}
    return {name: -array if "decay" in name else array for name, array in x.items()}


@pytest.mark.parametrize("rule", KEYWORDS)
def test_arguments_after_v_are_keywords_with_their_fixed_names(rule):
    parameters = inspect.signature(getattr(ops, rule)).parameters
    positional = [p.name for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v"]
    keywords = {p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert keywords == KEYWORDS[rule] | SHARED
    assert len(parameters) == 3 + len(keywords)  # neither *args nor **options


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"State"}))
def test_help_describes_every_argument(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    sections = ["Args:", "Returns:", "Raises:", "Example:"]
    starts = [text.index(f"\n{section}\n") for section in sections]
    assert starts == sorted(starts)
    described = text[starts[0] : starts[1]]
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in described or ("    q, k: " in described and argument in ("q", "k")), argument
    assert f"ops.{name}(" in text[starts[3] :]


@pytest.mark.usefixtures("our_checks")
def test_argument_order_of_another_library_is_refused():
    """flash-linear-attention has (q, k, v, g, beta): two arrays of one shape in the opposite order."""
    x = arrays("gated_delta_net")
    with pytest.raises(TypeError, match=r"gated_delta_net\(\) takes 3 positional arguments but 5 were given"):
        ops.gated_delta_net(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("rule", KEYWORDS)
def test_misspelt_keyword_is_refused_by_the_rule(rule):
    with pytest.raises(TypeError, match=rf"{rule}\(\) got an unexpected keyword argument 'chunk_sise'"):
        getattr(ops, rule)(**arrays(rule), chunk_sise=4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in KEYWORDS if rule != "exact_pdn"])
def test_array_as_initial_state(rule):
    """Values and gradient equal those for a State that holds the array."""
    x, function = arrays(rule), getattr(ops, rule)
    recurrent = jnp.asarray(np.random.default_rng(1).normal(size=(B, H, K, V)), jnp.float32)

    @jit
    def both(recurrent):
        def outputs(wrap):
            return lambda s: function(**x, initial_state=wrap(s))

        def loss(wrap):
            return lambda s: jnp.sum(jnp.sin(outputs(wrap)(s)[0]))

        wraps = (lambda s: s), ops.State
        return tuple((outputs(wrap)(recurrent), jax.grad(loss(wrap))(recurrent)) for wrap in wraps)

    (got, gradient), (want, expected) = both(recurrent)
    assert_close((got[0], tuple(got[1]), gradient), (want[0], tuple(want[1]), expected), 1e-6)
    assert np.abs(gradient).max() > 1e-3
    assert isinstance(got[1], ops.State)
    _, fresh = function(**x)
    assert type(got[1]) is type(fresh)
    assert got[1]._fields == ("recurrent", "preconditioner")


@pytest.mark.usefixtures("our_checks")
def test_wrong_initial_state_is_named():
    x = arrays("delta_net")
    with pytest.raises(TypeError, match=r"initial_state: got tuple, expected an ops.State, an array \[B, H, K, V\]"):
        ops.delta_net(**x, initial_state=(jnp.zeros((B, H, K, V)), None))
    with pytest.raises(ValueError, match=r"initial_state: got shape \(2, 2, 4, 3\), expected \[B, H, K, V\]"):
        ops.delta_net(**x, initial_state=jnp.zeros((B, H, V, K)))


@pytest.mark.usefixtures("our_checks")
def test_carry_of_a_scan():
    """A State as complete as the one that comes back can be the carry of `lax.scan`; an array cannot."""
    x, s = arrays("osdn"), jnp.zeros((B, H, K, V), jnp.float32)

    def decode(rule, state, **options):
        def step(state, token):
            o, state = rule(**{name: y[:, None] for name, y in token.items()}, initial_state=state, **options)
            return state, o[:, 0]

        return jax.lax.scan(step, state, {name: jnp.moveaxis(y, 1, 0) for name, y in x.items()})

    with pytest.raises(TypeError, match="carry"):
        decode(ops.delta_net, s)
    with pytest.raises(TypeError, match="carry"):
        decode(ops.osdn, ops.State(s))  # a preconditioner comes back
    for rule, state in ((ops.delta_net, ops.State(s)), (ops.osdn, ops.State(s, jnp.full((B, HK, K), 0.5)))):
        final, o = decode(rule, state)
        whole, want = rule(**x, initial_state=state)
        assert_close((jnp.moveaxis(o, 0, 1), final), (whole, want), 1e-5)


def test_the_package_shows_ops_and_nn_and_imports_them_on_use():
    program = (
        "import sys, osdn_jax\n"
        "assert {'nn', 'ops', '__version__'} <= set(dir(osdn_jax))\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
        "osdn_jax.ops.delta_net\n"
        "assert 'flax' not in sys.modules\n"
        "osdn_jax.nn.DeltaMixer\n"
        "try:\n"
        "    osdn_jax.op\n"
        "except AttributeError as error:\n"
        "    assert str(error) == \"module 'osdn_jax' has no attribute 'op'\"\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
