"""The training step: its numbers, its state, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM
from osdn_jax.nn.functional import functional
from osdn_jax.training import TrainState, make_train_step
from osdn_jax.training.stopwatch import Stopwatch
from support import jit, relative_error
from support.models import LENGTH, SEGMENTS, VOCABULARY, model_config, parameters_of, tokens


def batch_of(inputs, weights=None):
    targets = np.roll(inputs, -1, axis=1)
    weights = np.ones_like(inputs, np.float32) if weights is None else weights
    return {"inputs": jnp.asarray(inputs), "targets": targets, "segment_ids": jnp.asarray(SEGMENTS), "weights": weights}


def loss_of(apply, parameters, batch):
    """Mean negative log likelihood in nats, from the logits, in NumPy."""
    logits, _ = jit(lambda p: apply(p, batch["inputs"], segment_ids=batch["segment_ids"]))(parameters)
    logits = np.asarray(logits, np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / batch["weights"].sum()


@pytest.fixture(scope="module")
def made():
    """(apply, parameters, step) under plain gradient descent."""
    apply, parameters = parameters_of(model_config("linear_attention"))
    return apply, parameters, make_train_step(apply, optax.sgd(0.1))


def start(parameters, optimizer=None, seed=0):
    random = jax.random.key_data(jax.random.key(seed))
    copies = jax.tree.map(jnp.array, parameters)  # the step reuses the memory of its argument
    return TrainState.create(copies, optimizer or optax.sgd(0.1), random)


def test_the_numbers_of_a_step(made):
    apply, parameters, step = made
    weights = np.random.default_rng(1).integers(2, size=SEGMENTS.shape).astype(np.float32)
    batch = batch_of(tokens(), weights)
    state, metrics = step(start(parameters), batch)
    assert set(metrics) == {"loss", "gradient_norm", "update_norm"}
    assert {(x.dtype, x.shape) for x in metrics.values()} == {(jnp.dtype("float32"), ())}
    assert abs(metrics["loss"] - loss_of(apply, parameters, batch)) < 1e-5
    change = {name: np.asarray(state.params[name], np.float64) - x for name, x in parameters.items()}
    moved = np.sqrt(sum(np.sum(x**2) for x in change.values()))
    np.testing.assert_allclose(moved, metrics["update_norm"], rtol=1e-4)
    np.testing.assert_allclose(0.1 * metrics["gradient_norm"], metrics["update_norm"], rtol=1e-5)
    # Down along the gradient: the slope there is its norm.
    up, down = ({name: x + c * change[name] for name, x in parameters.items()} for c in (-1e-2, 1e-2))
    drop = (loss_of(apply, up, batch) - loss_of(apply, down, batch)) / 2e-2
    np.testing.assert_allclose(drop, moved * float(metrics["gradient_norm"]), rtol=0.01)
    assert int(state.step) == 1


def test_random_numbers_and_the_count_go_on(made):
    _, parameters, step = made
    first, _ = step(start(parameters), batch_of(tokens()))
    one = np.asarray(first.random)
    second, _ = step(first, batch_of(tokens()))
    assert int(second.step) == 2
    seen = {tuple(x) for x in (one, np.asarray(second.random), np.asarray(start(parameters).random))}
    assert len(seen) == 3


def test_a_step_is_compiled_once(made):
    _, parameters, step = made
    state = start(parameters)
    for _ in range(3):
        state, _ = step(state, batch_of(tokens()))
    assert step._cache_size() == 1


def test_a_batch_without_targets_changes_nothing(made):
    _, parameters, step = made
    state, metrics = step(start(parameters), batch_of(tokens(), np.zeros(SEGMENTS.shape, np.float32)))
    assert [float(x) for x in metrics.values()] == [0.0, 0.0, 0.0]
    for name, x in parameters.items():
        np.testing.assert_array_equal(state.params[name], x)


def test_dropout_goes_by_the_state_of_the_run():
    apply, parameters = parameters_of(model_config("linear_attention", dropout=0.5))
    step = make_train_step(apply, optax.sgd(0.1))
    a, same, b = (float(step(start(parameters, seed=s), batch_of(tokens()))[1]["loss"]) for s in (0, 0, 1))
    assert a == same != b


def test_learns_one_batch_by_heart():
    apply, parameters = functional(CausalLM(model_config("osdn"), rngs=nnx.Rngs(params=0)))
    optimizer = optax.adam(2e-2)
    step = make_train_step(apply, optimizer)
    state, batch = start(parameters, optimizer), batch_of(tokens())
    batch["weights"][:, [0, 5, 6, 13, LENGTH - 1]] = 0  # what comes after a document's first token, nobody can know
    losses = []
    for _ in range(250):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]) / np.log(2))
    assert losses[0] > np.log2(VOCABULARY) - 0.5
    assert losses[-1] < 0.1
    apply_one = jit(lambda p: apply(p, batch["inputs"], segment_ids=batch["segment_ids"])[0])
    predicted = np.asarray(apply_one(state.params)).argmax(-1)
    assert relative_error(predicted[batch["weights"] > 0], batch["targets"][batch["weights"] > 0]) == 0


# The stopwatch


def test_the_stopwatch_leaves_out_what_it_should(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("osdn_jax.training.stopwatch.time.perf_counter", lambda: now[0])
    clock = Stopwatch()
    now[0] += 5
    assert clock.rate(10) is None
    clock.start()
    assert clock.rate(10) is None
    now[0] += 2
    with clock.paused():
        now[0] += 50
        assert clock.seconds == 2
    now[0] += 3
    assert clock.seconds == 5
    assert clock.rate(10) == 2.0
    assert clock.rate(0) is None
    with pytest.raises(KeyError), clock.paused():
        raise KeyError
    now[0] += 5
    assert clock.rate(10) == 1.0  # it runs again, whatever happened inside
