"""The form in which a rule is passed to the bench."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of the bench: the write keys w_t of a delta rule, or a whole memory.

        S_t = exp(log_decay) S_{t-1} + beta_t w_t (v_t - exp(log_decay) S_{t-1}^T k_t)^T

    Attributes:
        write_key: function of (k [B, T, 1, K], beta [B, T, 1]) that returns the write keys, [B, T, 1, K]; with `told`,
            of (k, beta, second_moment [B, T, 1, K]). `jax.jit` must be able to trace it. w_t may depend on the tokens
            up to t.
        run: instead of write_key, a function called with (q, k, v, beta=beta) that returns the outputs S_t^T q_t
            [B, T, 1, V], not scaled, or a tuple that begins with them. beta = 0 must leave the memory as it is.
        log_decay: natural log of the decay of the memory at each token; default 0, no decay.
        reads_beta: False if the write keys do not depend on beta; they are then computed once for all values of it.
        told: the rule is told E k_i^2, the distribution of the keys, which no rule in a model is.
        families: names of the families of conditions that it is measured in; default all.
        about: one line for the tables.

    Raises:
        ValueError: both or none of write_key and run are given, or log_decay is above 0.

    Example:
        >>> from osdn_jax.regression import Rule
        >>> half = Rule(write_key=lambda k, beta: 0.5 * k, reads_beta=False, about="half of the key")
    """

    write_key: Callable[..., jax.Array] | None = None
    run: Callable[..., Any] | None = None
    log_decay: float = 0.0
    reads_beta: bool = True
    told: bool = False
    families: tuple[str, ...] | None = None
    about: str = ""

    def __post_init__(self) -> None:
        """Check what is given."""
        if (self.write_key is None) == (self.run is None):
            given = "none" if self.run is None else "both"
            raise ValueError(f"Rule: got {given} of write_key and run, expected one of them")
        if not self.log_decay <= 0:
            raise ValueError(f"log_decay: got {self.log_decay}, expected at most 0")


def as_rule(name: str, rule: Rule | Callable[..., Any]) -> Rule:
    """Return the rule of a function: of (k, beta), its write keys; of (q, k, v, beta), a whole memory.

    Args:
        name: the rule's name, for the error.
        rule: a `Rule`, or one of the two functions. The last argument is passed by keyword if it has to be.

    Raises:
        TypeError: it is neither.

    Example:
        >>> as_rule("half", lambda k, beta: 0.5 * k).run is None
        True
    """
    if isinstance(rule, Rule):
        return rule
    expected = "expected a Rule, a function of (k, beta) or one of (q, k, v, beta)"
    if not callable(rule):
        raise TypeError(f"rules: {name}: got {type(rule).__name__}, {expected}")
    try:
        parameters = inspect.signature(rule).parameters.values()
    except ValueError as error:
        raise TypeError(f"rules: {name}: got a function whose signature cannot be read, {expected}") from error
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in variable]
    by_keyword = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    if by_keyword not in ([], ["beta"]) or len(needed) not in (2, 4):
        raise TypeError(f"rules: {name}: got a function of ({', '.join(p.name for p in needed)}), {expected}")

    def write_key(k: jax.Array, beta: jax.Array) -> Any:
        return rule(k, beta=beta) if by_keyword else rule(k, beta)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> Any:
        return rule(q, k, v, beta=beta) if by_keyword else rule(q, k, v, beta)

    return Rule(write_key=write_key) if len(needed) == 2 else Rule(run=run)
