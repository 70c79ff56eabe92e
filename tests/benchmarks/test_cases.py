"""The cases of the checks and their inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import cases, check
from pallas_kernels.delta_rule.split_sequence import split_count


@pytest.mark.parametrize("case", check.CASES.values(), ids=check.CASES)
def test_near_parallel_keys_are_near(case):
    short = dataclasses.replace(case, batch=1, length=min(case.length, 400))
    arrays, ids = check.draw(short, "near-parallel", 0)
    k = arrays["k"].astype(np.float64)
    assert np.einsum("btk,btk->bt", k[:, :-1, 0], k[:, 1:, 0]).min(initial=1.0) > 0.95
    assert (ids is None) == (not case.documents)
    assert arrays["k"].dtype == jnp.dtype(case.dtype)


def ways(case, keys, seed):
    """Return how the kernel treats the chunks of each head: far from the bounds, tested and kept, or recomputed."""
    x, _ = check.draw(case, keys, seed)
    x = {name: a.astype(np.float64) for name, a in x.items()}
    lo, hi = cases.BINDING["bounds"]
    u, beta, forget = np.square(x["k"]), x["beta"], np.exp(x["log_forget"])
    d = np.broadcast_to(x["initial"], u[:, 0].shape)
    found = {}
    for start in range(0, case.length, 64):
        first, left, added, values = d, np.ones_like(beta[:, 0]), [], []
        for t in range(start, min(start + 64, case.length)):
            b, kept = beta[:, t], forget[:, t]
            added.append((b * (1 - b * np.sum(d * u[:, t], axis=-1)))[..., None] * u[:, t])
            d, left = 1 + kept[..., None] * (d - 1) + added[-1], left * kept
            values.append(d)
            d = np.clip(d, lo, hi)
        values, added = np.array(values), np.array(added)
        last = 1 + left[..., None] * (first - 1)
        least = np.minimum(first, last) + np.minimum(added, 0).sum(0)
        most = np.maximum(first, last) + np.maximum(added, 0).sum(0)
        again = ((values < lo) | (values > hi)).any((0, -1))
        close = ((least < lo) | (most > hi)).any(-1)
        way = np.where(again, "again", np.where(close, "kept", "far"))
        for head in range(case.heads):
            found.setdefault(head % 4, set()).update(way[:, head])
    return found


@pytest.mark.parametrize("keys", check.KEYS)
def test_peaked_keys_leave_the_bounds_nearly_leave_them_and_stay_far(keys):
    case = cases.CASES["hypergradient, bounds that bind"]
    found = [ways(case, keys, seed) for seed in range(case.seeds)]
    assert all(set().union(*one.values()) == {"far", "kept", "again"} for one in found)
    assert all({"kept", "again"} <= one[2] for one in found)  # a head with both
    smoke = cases.SMOKE["hypergradient, sequential fallback, gradient"]
    assert set().union(*ways(smoke, "random", 0).values()) == {"far", "kept", "again"}


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("section", ["smoke", "check"])
def test_every_case_reaches_its_kernel(section, implementation):
    """Without a GPU it is refused for that reason alone, without a fallback."""
    for case in cases.cases_of(section, dry=False, implementation=implementation).values():
        arrays, ids = check.draw(dataclasses.replace(case, length=1, batch=1), "random", 0)
        with pytest.raises(NotImplementedError, match=f"'{implementation}': got a cpu, the kernels need an? .*GPU"):
            jax.eval_shape(lambda x, i, case=case: cases.outputs(case, x, i, implementation), arrays, ids)


def test_what_only_triton_serves_is_only_checked_there():
    of_hopper, of_triton = (cases.cases_of("check", False, name) for name in ("mosaic_gpu", "triton"))
    assert of_hopper == cases.CASES
    more = [case for name, case in of_triton.items() if name not in of_hopper]
    assert {case.dtype for case in more} == {"bfloat16", "float32"}
    assert {case.dtype for case in of_hopper.values()} == {"bfloat16", "float16"}
    dims = {size for case in more for size in (case.key_dim, case.value_dim)}
    assert {32, 48, 64, 96, 128, 256} == dims
    for preset in (None, "gram", "trust"):
        assert "float32" in {case.dtype for case in more if case.preset == preset}
    with pytest.raises(KeyError):
        cases.cases_of("check", True, "mosaic_gpu")["scalar decay, float32, tiny"]
    assert "scalar decay, float32, tiny" in cases.cases_of("check", True, "triton_interpret")


def test_the_cases_reach_splits_waves_types_and_lengths():
    all_cases = cases.CASES.values()
    rules = [case for case in all_cases if case.preset is None]

    def splits(c):
        return split_count(c.batch, c.heads, -(-c.length // 64), c.key_dim, c.value_dim)

    assert {case.decay for case in rules if splits(case) > 1} == {"scalar", "channel"}
    assert max(case.batch * case.heads * -(-case.length // 64) for case in rules) > 4 * 132
    assert max(case.batch * case.heads * case.value_dim // 64 for case in rules) > 4 * 132  # of the scans
    for some in (rules, [c for c in all_cases if c.preset == "gram"], [c for c in all_cases if c.preset == "binding"]):
        assert max(case.batch * case.heads for case in some) > 2 * 132
    for some in (rules, [case for case in all_cases if case.preset not in (None, "gram")]):
        assert "float16" in {case.dtype for case in some}
        assert 1 in {case.length for case in some}
    assert {(64, 128), (128, 64), (256, 64)} <= {(case.key_dim, case.value_dim) for case in rules}
