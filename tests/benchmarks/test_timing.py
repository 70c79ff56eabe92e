"""Timed programs, their inputs and their differences from the XLA form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import plan, timing
from osdn_jax.compare import parse_shapes
from support.gpu_records import REQUEST


@pytest.mark.parametrize("rule", plan.TIMED_RULES)
def test_every_timed_rule_reaches_its_kernels(rule):
    for shape in plan.SHAPES:
        arguments = timing.abstract(rule, parse_shapes(shape)[0])
        with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu, the kernels need a GPU"):
            jax.eval_shape(timing.program_of(rule, "mosaic_gpu", False), arguments)
    jobs = [job for stage in plan.STAGES for job in plan.plan_stage(stage, [], REQUEST).jobs]
    assert {job.spec["implementation"] for job in jobs} == {"mosaic_gpu"}


def test_the_inputs_to_time_are_as_promised():
    shape = parse_shapes("B2T100H4Hk2D8")[0]
    pool, other = timing.pools("pkda", shape, 2)
    arrays, cotangent = timing.fill(pool, shape, 0)
    expected = timing.abstract("pkda", shape)
    assert {n: (x.shape, x.dtype) for n, x in arrays.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    assert "initial_state" not in arrays
    assert cotangent.shape == arrays["v"].shape == timing.output_shape(shape)
    assert not np.array_equal(arrays["v"], timing.fill(other, shape, 0)[0]["v"])
    assert len({tuple(v) for v in np.asarray(arrays["v"], np.float32).reshape(200, -1)[:100].tolist()}) > 50


def test_batches_alternate_and_are_long_enough(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def contender(name, seconds):
        def call(i):
            now[0] += 1e-5
            return log.append(name)

        return timing.QueuedContender(name, call, lambda out: now.__setitem__(0, now[0] + seconds))

    a, b = contender("a", 0.01), contender("b", 0.0)
    for c in (a, b):
        c.settle(0.05)
    assert b.calls * 1e-5 >= 0.04
    log.clear()
    timing.take_turns([a, b], 2)
    assert re.fullmatch("(a+b+){2}", "".join(log))
    assert b.row()["host_bound"]


def test_a_missing_gradient_is_infinitely_far():
    assert timing.difference(None, jnp.ones(3)) == np.inf
    assert timing.difference(jnp.full(3, jnp.nan), jnp.ones(3)) == np.inf
    assert timing.difference(jnp.zeros(3), jnp.zeros(3)) == 0
