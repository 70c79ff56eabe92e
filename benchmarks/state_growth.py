"""Search for unit keys and gates under which a rule's state grows:  python -m benchmarks.state_growth

A cycle of tokens is repeated, and a population of cycles climbs toward the largest growth rate of the state, by random
changes of its keys and gates. States start from the identity and write values of zero, so that a state is the product
of the transitions. The search looks at tokens 120 to 240; the best cycle of each search then runs ten times as long,
which tells a lasting growth from a transient one, and of these the table shows the one that lasts best. It takes about
7 minutes of one CPU core; fewer rules, with --rules, take less.
"""

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax import command, ops

Rule = Callable[[jax.Array, jax.Array, ops.State], tuple[jax.Array, ops.State]]
POPULATION, PARENTS = 128, 16
HALF = 120  # tokens of each half of a run, at least; the rate is that of the second half
LONG = 10  # how many times as long the run is that a growth has to last


def _gate(raw: jax.Array) -> jax.Array:
    """Return a gate in (0, 1), which the search can bring close to both ends."""
    return jax.nn.sigmoid(3.0 * raw)


def _osdn(*, beta_aware: bool = False, forget: float | str | None = None, **settings: Any) -> Rule:
    options = ops.hypergradient_preset("paper") | settings

    def rule(k: jax.Array, raw: jax.Array, state: ops.State) -> tuple[jax.Array, ops.State]:
        gates = dict(options)
        if forget is not None:
            free = forget == "free"
            gates["log_forget"] = jnp.log(_gate(raw[..., 1]) if free else jnp.full(k.shape[:3], forget, k.dtype))
        return ops.osdn(
            k,
            k,
            jnp.zeros_like(k),
            beta=_gate(raw[..., 0]),
            beta_aware=beta_aware,
            initial_state=state,
            implementation="scan",
            **gates,
        )

    return rule


def _pdn(*, squash: float = 1.5, memory: float | None = None) -> Rule:
    def rule(k: jax.Array, raw: jax.Array, state: ops.State) -> tuple[jax.Array, ops.State]:
        decay = _gate(raw[..., 1]) if memory is None else jnp.full(k.shape[:3], 1 - 1 / memory, k.dtype)
        return ops.pdn(
            k,
            k,
            jnp.zeros_like(k),
            beta=_gate(raw[..., 0]),
            gram_log_decay=jnp.log(decay),
            gram_gain=_gate(raw[..., 2]),
            center=3.0 * raw[0, 0, :, 3],
            squash=squash,
            initial_state=state,
            implementation="scan",
        )

    return rule


def _gdn2(k: jax.Array, raw: jax.Array, state: ops.State) -> tuple[jax.Array, ops.State]:
    zero, one = jnp.zeros_like(k), jnp.ones_like(k)
    gate = _gate(raw[..., : k.shape[-1]])
    return ops.gdn2(
        k, k, zero, erase_gate=gate, write_gate=one, log_decay=zero, initial_state=state, implementation="scan"
    )


def _any_diagonal(k: jax.Array, raw: jax.Array, state: ops.State) -> tuple[jax.Array, ops.State]:
    """Let d be any number between 2/3 and 3/2 for each token and channel."""
    d = 1.5 ** jnp.tanh(raw[..., : k.shape[-1]])
    o, recurrent = ops.delta_rule(
        k,
        k,
        jnp.zeros_like(k),
        jnp.ones(k.shape[:3], k.dtype),
        write_key=d * k,
        initial_state=state.recurrent,
        implementation="scan",
    )
    return o, ops.State(recurrent)


RULES: dict[str, tuple[str, Rule]] = {
    "gdn2": ("GDN-2, erase gates free", _gdn2),
    "any_d": ("any d in [2/3, 3/2], β = 1", _any_diagonal),
    "osdn_forget": ("OSDN, forgetting free, anchor 0", _osdn(forget="free")),
    "osdn_forget_0.9": ("OSDN, forgetting 0.9, anchor 0", _osdn(forget=0.9)),
    "osdn_forget_0.999": ("OSDN, forgetting 0.999, anchor 0", _osdn(forget=0.999)),
    "osdn_aware": ("OSDN, beta-aware, η = 1", _osdn(beta_aware=True)),
    "osdn": ('OSDN, "paper"', _osdn()),
    "trust": ('OSDN, "trust"', _osdn(**ops.hypergradient_preset("trust"))),
    "trust_aware": ('OSDN, beta-aware "trust"', _osdn(beta_aware=True, **ops.hypergradient_preset("trust"))),
    "trust_eta_40": ('OSDN, bounds of "trust", η = 40', _osdn(eta=40.0, bounds=(2 / 3, 3 / 2), initial=0.8)),
    "pdn": ("PDN, x = 1.5, all gates free", _pdn()),
    "pdn_2": ("PDN, x = 2, all gates free", _pdn(squash=2.0)),
    "pdn_memory": ("PDN, x = 1.5, Gram of 100 tokens", _pdn(memory=100.0)),
}


def _rates(rule: Rule, channels: int, cycle: int, times: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from a population [N, numbers] to the growth rates [N] of its cycles."""
    halves = times * -(-HALF // cycle)

    @jax.jit
    def rates(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(len(x), cycle, -1), 0, 1)[None]  # [1, cycle, N, channels + gates]
        k = x[..., :channels] / jnp.linalg.norm(x[..., :channels], axis=-1, keepdims=True)
        tokens = [jnp.tile(a, (1, halves, 1, 1)) for a in (k, x[..., channels:])]
        identity = ops.State(jnp.tile(jnp.eye(channels), (1, k.shape[2], 1, 1)))
        _, first = rule(*tokens, identity)
        # A state that vanishes or is reset has no rate; one that grows has less than 1e100 in a half of 120 tokens.
        before = jnp.linalg.norm(first.recurrent[0], axis=(1, 2))
        _, second = rule(*tokens, first._replace(recurrent=first.recurrent / before[:, None, None]))
        rate = jnp.log(jnp.linalg.norm(second.recurrent[0], axis=(1, 2))) / (halves * cycle)
        return jnp.where(jnp.isfinite(rate), rate, -jnp.inf)

    return lambda x: np.asarray(rates(jnp.asarray(x)))


def climb(rule: Rule, channels: int, cycle: int, steps: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Return (largest rate per token, its cycle [cycle, channels + gates]) of a search of `steps` generations."""
    rates = _rates(rule, channels, cycle, 1)
    numbers = cycle * (channels + max(4, channels))
    found = rng.normal(size=(POPULATION, numbers))
    value = rates(found)
    for step in range(steps):
        best = np.argsort(-value, kind="stable")[:PARENTS]
        parents, kept = found[best], value[best]
        size = 0.5 * 0.98**step * np.exp(rng.normal(size=(POPULATION, 1)))
        changed = rng.uniform(size=(POPULATION, numbers)) < 0.4
        children = parents[rng.integers(0, PARENTS, POPULATION)]
        children = children + size * changed * rng.normal(size=(POPULATION, numbers))
        found, value = np.concatenate([parents, children]), np.concatenate([kept, rates(children)])
    best = int(np.argmax(value))
    return float(value[best]), found[best].reshape(cycle, -1)


def print_table(rules: list[str], channels: list[int], cycles: list[int], steps: int, seeds: range) -> None:
    """Search for each rule and print its row, and at the end the CPU time of all."""
    print("| rule | growth per token | tokens 1,200 to 2,400 | in 1,000 tokens | tokens in the cycle, channels |")
    print("| --- | --- | --- | --- | --- |")
    start = time.process_time()
    for name in rules:
        title, rule = RULES[name]
        best = (-np.inf, -np.inf, 0, 0)
        for size, cycle, seed in itertools.product(channels, cycles, seeds):
            rate, tokens = climb(rule, size, cycle, steps, np.random.default_rng(seed))
            lasting = float(_rates(rule, size, cycle, LONG)(tokens.reshape(1, -1))[0])
            best = max(best, (lasting, rate, cycle, size))
        lasting, rate, cycle, size = best
        row = (title, f"{np.exp(rate):.4f}", f"{np.exp(lasting):.4f}", f"{np.exp(1000 * lasting):.0e}")
        print(f"| {' | '.join(row)} | {cycle}, {size} |", flush=True)
    print(f"\n{time.process_time() - start:.0f} s of CPU time, {os.cpu_count()} cores, JAX {jax.__version__}")


def main(arguments: list[str] | None = None) -> None:
    """Run the searches and print the table."""
    parser = command.Parser(prog="python -m benchmarks.state_growth", description=__doc__.splitlines()[0])
    parser.add_argument("--rules", default=",".join(RULES), help=f"of {', '.join(RULES)}; default all")
    parser.add_argument("--channels", default="2,3,4", help="key channels to try; default %(default)s")
    parser.add_argument("--cycles", default="2,3,4,6", help="tokens in a cycle to try; default %(default)s")
    parser.add_argument("--steps", type=int, default=250, help="generations of each search; default %(default)s")
    parser.add_argument("--searches", type=int, default=3, help="of each size, from other seeds; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first search; default %(default)s")
    args = parser.parse_args(arguments)
    rules = args.rules.split(",")
    for name in rules:
        if name not in RULES:
            parser.error(f"--rules: got {name!r}, expected some of {', '.join(RULES)}")
    try:
        channels, cycles = ([int(x) for x in text.split(",")] for text in (args.channels, args.cycles))
    except ValueError:
        parser.error("--channels and --cycles: expected integers with commas between them")
    if min(*channels, *cycles, args.steps, args.searches) < 1 or args.seed < 0:
        parser.error("--channels, --cycles, --steps and --searches: expected at least 1, and --seed at least 0")
    with jax.enable_x64(True):
        print_table(rules, channels, cycles, args.steps, range(args.seed, args.seed + args.searches))


if __name__ == "__main__":
    command.run(main)
