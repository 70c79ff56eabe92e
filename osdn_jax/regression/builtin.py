"""The built-in rules and controls of the bench."""

import math
from typing import Any

from osdn_jax.regression import write_keys as w
from osdn_jax.regression.rules import Rule

_WIDE = (0.0, 1e9)  # bounds of the paper's form
_TRUST: dict[str, Any] = {"eta": 0.003, "initial": 1.0, "bounds": (2 / 3, 3 / 2)}
_KEEP = math.log(0.999)
_CHANGING = ("drifting",)


def _rule(write_key: w.WriteKey, about: str, *, reads_beta: bool = False, **options: Any) -> Rule:
    return Rule(write_key=write_key, about=about, reads_beta=reads_beta, **options)


def _osdn(eta: float, initial: float, **options: Any) -> w.WriteKey:
    return w.hypergradient(eta=eta, initial=initial, bounds=_WIDE, **options)


RULES: dict[str, Rule] = {
    "delta_net": _rule(w.plain, "DeltaNet: w = k"),
    "osdn_paper": _rule(_osdn(1.0, 0.0), "OSDN, d_0 = 0, eta 1, not projected from above"),
    "osdn_ones": _rule(_osdn(1.0, 1.0), "OSDN from d_0 = 1, eta 1"),
    "osdn_ones_0.1": _rule(_osdn(0.1, 1.0), "OSDN from d_0 = 1, eta 0.1"),
    "osdn_ones_beta": _rule(
        _osdn(1.0, 1.0, beta_aware=True), "OSDN from d_0 = 1, eta 1, feedback with beta", reads_beta=True
    ),
    "osdn_trust": _rule(w.hypergradient(**_TRUST), "OSDN from d_0 = 1, eta 0.003, d within [2/3, 3/2]"),
    "osdn_trust_beta": _rule(
        w.hypergradient(beta_aware=True, **_TRUST), "osdn_trust, feedback with beta", reads_beta=True
    ),
    "apf_0": _rule(_osdn(1.0, 0.0, forget=0.99), "osdn_paper that forgets d toward 0 (factor 0.99)"),
    "apf_1": _rule(_osdn(1.0, 0.0, forget=0.99, anchor=1.0), "osdn_paper that forgets d toward 1 (factor 0.99)"),
    "pdn_paper": _rule(w.gram(1.5, memory=None), "PDN, x = 1.5, initial center of the paper (-0.2), A without decay"),
    "pdn_1.5": _rule(w.gram(1.5), "PDN, x = 1.5, A of about 100 tokens"),
    "pdn_2": _rule(w.gram(2.0), "PDN, x = 2, A of about 100 tokens"),
    "pdn_4": _rule(w.gram(4.0), "PDN, x = 4 (the paper's bound is 2), A of about 100 tokens"),
    "matched_1.5": _rule(w.matched(1.5), "control: DeltaNet with the step <w, k> of pdn_1.5 at every token"),
    "matched_2": _rule(w.matched(2.0), "control: DeltaNet with the step <w, k> of pdn_2 at every token"),
    "unit_step": _rule(w.unit_step(), "control: w = k / <k, k> (normalised LMS); DeltaNet on unit keys"),
    "pdn_unit_step": _rule(w.unit_step(2.0), "control: pdn_2 divided by its step: w = m k / <m, k^2>"),
    "mean_step": _rule(w.mean_step(), "control: w = k / (mean <k, k> of about 100 tokens)"),
    "pdn_mean_step": _rule(w.mean_step(2.0), "control: w = m k / (mean <m, k^2> of about 100 tokens), m of pdn_2"),
    "key_feedback": _rule(w.feedback_on_key(2.0, eta=1.0), "w = d m k, d by OSDN's feedback on k^2, eta 1, m of pdn_2"),
    "write_feedback": _rule(
        w.feedback_on_write_key(2.0, eta=1.0), "w = d m k, d by the feedback on m k^2, eta 1, m of pdn_2"
    ),
    "write_feedback_0.1": _rule(w.feedback_on_write_key(2.0, eta=0.1), "write_feedback with eta 0.1"),
    "scale_feedback": _rule(
        w.scale_by_feedback(2.0, eta=1.0), "w = s m k, one scalar s by the feedback on <m, k^2>, eta 1, m of pdn_2"
    ),
    "scale_feedback_0.1": _rule(w.scale_by_feedback(2.0, eta=0.1), "scale_feedback with eta 0.1"),
    "scale_only": _rule(w.scale_by_feedback(1.0, eta=1.0), "w = s k, one scalar s by the feedback on <k, k>, eta 1"),
    "gated_delta_net": _rule(w.plain, "Gated DeltaNet, decay 0.999 a token", log_decay=_KEEP, families=_CHANGING),
    "pgdn_2": _rule(w.gram(2.0), "PGDN: pdn_2, decay 0.999 a token", log_decay=_KEEP, families=_CHANGING),
    "told_scale": _rule(w.told_scale, "control: w = k / E<k, k>, scale told", told=True, families=("scale",)),
    "told_diagonal": _rule(w.told_diagonal, "control: w = d k, fixed d ~ (E k_i^2)^-1/2, distribution told", told=True),
    "exact_gram": _rule(w.exact_gram, "control: the exact Gram; beta = 1 is ridge regression (ridge 0.001)"),
}
