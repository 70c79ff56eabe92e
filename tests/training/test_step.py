"""The training step: its numbers, its state, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM, likelihood_sums
from osdn_jax.nn.split import split_model
from osdn_jax.training import StepConfig, TrainState, make_train_step
from support import assert_close, jit, relative_error
from support.models import LENGTH, SEGMENTS, VOCABULARY, model_config, parameters_of, tokens


def batch_of(inputs, weights=None):
    targets = np.roll(inputs, -1, axis=1)
    weights = np.ones_like(inputs, np.float32) if weights is None else weights
    return {"inputs": jnp.asarray(inputs), "targets": targets, "segment_ids": jnp.asarray(SEGMENTS), "weights": weights}


def loss_of(apply, parameters, batch):
    """Return the mean negative log likelihood in nats, from the logits, in NumPy."""
    logits, _ = jit(lambda p: apply(p, batch["inputs"], segment_ids=batch["segment_ids"]))(parameters)
    logits = np.asarray(logits, np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / batch["weights"].sum()


@pytest.fixture(scope="module")
def made():
    """Return (apply, parameters, step) for plain gradient descent."""
    apply, parameters = parameters_of(model_config("linear_attention"))
    return apply, parameters, make_train_step(apply, optax.sgd(0.1))


def start(parameters, optimizer=None, seed=0):
    random = jax.random.key_data(jax.random.key(seed))
    copies = jax.tree.map(jnp.array, parameters)  # the step donates its argument
    return TrainState.create(copies, optimizer or optax.sgd(0.1), random)


def test_the_numbers_of_a_step(made):
    apply, parameters, step = made
    weights = np.random.default_rng(1).integers(2, size=SEGMENTS.shape).astype(np.float32)
    batch = batch_of(tokens(), weights)
    state, metrics = step(start(parameters), batch)
    norms = {"loss", "gradient_norm", "update_norm", "parameter_norm"}
    assert set(metrics) == norms | {"skipped_steps", "skipped_in_a_row"}
    for name, x in metrics.items():
        assert (x.dtype, x.shape) == (jnp.dtype("float32" if name in norms else "int32"), ())
    squares = sum(np.sum(np.asarray(x, np.float64) ** 2) for x in state.params.values())
    np.testing.assert_allclose(metrics["parameter_norm"], np.sqrt(squares), rtol=1e-6)
    assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 0
    assert abs(metrics["loss"] - loss_of(apply, parameters, batch)) < 1e-5
    change = {name: np.asarray(state.params[name], np.float64) - x for name, x in parameters.items()}
    moved = np.sqrt(sum(np.sum(x**2) for x in change.values()))
    np.testing.assert_allclose(moved, metrics["update_norm"], rtol=1e-4)
    np.testing.assert_allclose(0.1 * metrics["gradient_norm"], metrics["update_norm"], rtol=1e-5)
    # Along the negative gradient: the slope is its norm.
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
    apply, parameters, _ = made
    step = make_train_step(apply, optax.sgd(0.1))  # not that of the other tests, which may have compiled it
    state = start(parameters)
    for _ in range(3):
        state, _ = step(state, batch_of(tokens()))
    assert step._cache_size() == 1


def test_a_batch_without_targets_changes_nothing(made):
    _, parameters, step = made
    state, metrics = step(start(parameters), batch_of(tokens(), np.zeros(SEGMENTS.shape, np.float32)))
    assert [float(metrics[name]) for name in ("loss", "gradient_norm", "update_norm", "skipped_steps")] == [0.0] * 4
    for name, x in parameters.items():
        np.testing.assert_array_equal(state.params[name], x)


def test_dropout_goes_by_the_state_of_the_run():
    apply, parameters = parameters_of(model_config("linear_attention", dropout=0.5))
    step = make_train_step(apply, optax.sgd(0.1))
    a, same, b = (float(step(start(parameters, seed=s), batch_of(tokens()))[1]["loss"]) for s in (0, 0, 1))
    assert a == same != b


def test_learns_one_batch_by_heart():
    apply, parameters = split_model(CausalLM(model_config("osdn"), rngs=nnx.Rngs(params=0)))
    optimizer = optax.adam(2e-2)
    step = make_train_step(apply, optimizer)
    state, batch = start(parameters, optimizer), batch_of(tokens())
    batch["weights"][:, [0, 5, 6, 13, LENGTH - 1]] = 0  # a document's second token cannot be predicted
    losses = []
    for _ in range(250):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]) / np.log(2))
    assert losses[0] > np.log2(VOCABULARY) - 0.5
    assert losses[-1] < 0.1
    apply_one = jit(lambda p: apply(p, batch["inputs"], segment_ids=batch["segment_ids"])[0])
    predicted = np.asarray(apply_one(state.params)).argmax(-1)
    assert relative_error(predicted[batch["weights"] > 0], batch["targets"][batch["weights"] > 0]) == 0


# Options of a step


def uneven(rows):
    """Return a batch whose rows have from none to all of their targets; ignored ones are not valid tokens."""
    rng = np.random.default_rng(2)
    weights = (np.arange(LENGTH) < rng.integers(LENGTH, size=(rows, 1))).astype(np.float32)
    weights[0], weights[1] = 0, 1
    inputs = tokens(3, batch=rows)
    ids = np.tile(SEGMENTS, (rows // len(SEGMENTS), 1))
    targets = np.where(weights > 0, np.roll(inputs, -1, axis=1), -100)
    return {"inputs": inputs, "targets": targets, "segment_ids": ids, "weights": weights}


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_is_the_whole_batch(made, parts):
    apply, parameters, _ = made
    batch, sgd = uneven(8), optax.sgd(10.0)  # large changes, so that adding them to a scale of 1 loses no digits
    state, metrics = make_train_step(apply, sgd)(start(parameters), batch)
    other, also = make_train_step(apply, sgd, StepConfig(accumulate=parts))(start(parameters), batch)
    assert_close(also, metrics, 1e-6)
    changes = ({name: x - parameters[name] for name, x in s.params.items()} for s in (other, state))
    assert_close(*changes, 1e-5)
    assert {x.dtype for x in other.params.values()} == {jnp.dtype("float32")}


def test_parts_that_do_not_divide_the_rows_are_refused(made):
    apply, parameters, _ = made
    step = make_train_step(apply, optax.sgd(0.1), StepConfig(accumulate=3))
    with pytest.raises(ValueError, match="batch: got 8 rows, expected a multiple of accumulate = 3"):
        step(start(parameters), uneven(8))


def words(parameters, inputs=None, *, method, dropout_key=None, **_):
    """A model without a state, so that nothing else is in the program; dropout drops whole batches."""
    if method == "unembedding":
        return parameters["words"]
    return parameters["words"][inputs] * jax.random.uniform(dropout_key), None


def start_of_words():
    return start({"words": jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, 4)), jnp.float32)})


def test_parts_draw_their_own_dropout():
    one = uneven(2)
    batch = {name: np.repeat(x, 2, axis=0) for name, x in one.items()}  # both micro-batches have the same rows
    state = start_of_words()
    _, key = jax.random.split(jax.random.wrap_key_data(state.random))
    want = [
        likelihood_sums(words, state.params, one, dropout_key=jax.random.fold_in(key, part)).nats for part in (0, 1)
    ]
    assert abs(want[0] - want[1]) > 1
    _, metrics = make_train_step(words, optax.sgd(0.1), StepConfig(accumulate=2))(state, batch)
    np.testing.assert_allclose(metrics["loss"], sum(want) / batch["weights"].sum(), rtol=1e-6)


def test_rows_of_parts_stay_on_their_devices():
    step = make_train_step(words, optax.sgd(0.1), StepConfig(accumulate=2))
    batch, state = uneven(16), start_of_words()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    compiled = step.lower(jax.device_put(state, jax.NamedSharding(mesh, jax.P())), rows).compile()
    assert "all-reduce" in compiled.as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in compiled.as_text()


def test_the_z_loss_is_in_the_gradient_and_not_in_the_loss(made):
    apply, parameters, plain = made
    batch = uneven(2)
    z = 0.3
    state, metrics = make_train_step(apply, optax.sgd(0.1), StepConfig(z_loss=z))(start(parameters), batch)
    without, also = plain(start(parameters), batch)
    assert float(metrics["loss"]) == float(also["loss"])

    def squares(p):
        logits, _ = apply(p, jnp.asarray(batch["inputs"]), segment_ids=jnp.asarray(batch["segment_ids"]))
        normalizers = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(normalizers**2 * batch["weights"]) / batch["weights"].sum()

    more = {name: x - without.params[name] for name, x in state.params.items()}
    want = jax.tree.map(lambda g: -0.1 * z * g, jit(jax.grad(squares))(parameters))
    assert_close(more, want, 1e-4)


def test_the_moving_average(made):
    apply, parameters, _ = made
    optimizer = optax.sgd(0.1)
    step = make_train_step(apply, optimizer, StepConfig(ema=0.75))
    copies = jax.tree.map(jnp.array, parameters)
    state = TrainState.create(copies, optimizer, jax.random.key_data(jax.random.key(0)), ema=True)
    want = parameters
    for seed in range(3):
        state, _ = step(state, batch_of(tokens(seed)))
        want = {name: 0.75 * x + 0.25 * state.params[name] for name, x in want.items()}
    assert_close(state.ema, want, 1e-6)
    assert state.evaluated is state.ema
    assert start(parameters).evaluated is not None
    assert start(parameters).ema is None
    assert {x.dtype for x in state.ema.values()} == {jnp.dtype("float32")}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(made):
    apply, parameters, _ = made
    optimizer = optax.adam(0.1)
    step = make_train_step(apply, optimizer, StepConfig(ema=0.5))
    state = TrainState.create(
        jax.tree.map(jnp.array, parameters), optimizer, jax.random.key_data(jax.random.key(0)), ema=True
    )
    state, _ = step(state, batch_of(tokens()))
    before = jax.tree.map(np.asarray, state)
    poison = batch_of(tokens(), np.full(SEGMENTS.shape, np.nan, np.float32))
    for count in (1, 2):
        state, metrics = step(state, poison)
        assert [int(metrics[name]) for name in ("skipped_steps", "skipped_in_a_row")] == [count, count]
        assert np.isnan(metrics["loss"])
        assert np.isnan(metrics["update_norm"])
        for got, want in zip(
            jax.tree.leaves((state.params, state.optimizer, state.ema)),
            jax.tree.leaves((before.params, before.optimizer, before.ema)),
            strict=True,
        ):
            np.testing.assert_array_equal(got, want)
        assert int(state.step) == 1 + count
        assert not np.array_equal(state.random, before.random)
    state, metrics = step(state, batch_of(tokens()))
    assert [int(metrics[name]) for name in ("skipped_steps", "skipped_in_a_row")] == [2, 0]
    assert metrics["update_norm"] > 0


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_skipped():
    def apply(parameters, inputs=None, *, method, **_):
        root = jnp.sqrt(parameters["x"])  # its slope at 0 is infinite
        return jnp.ones((VOCABULARY, 4)) if method == "unembedding" else (jnp.zeros((*inputs.shape, 4)) + root, None)

    state, metrics = make_train_step(apply, optax.sgd(0.1))(start({"x": jnp.zeros(())}), batch_of(tokens()))
    assert np.isfinite(metrics["loss"])
    assert (int(metrics["skipped_steps"]), float(state.params["x"])) == (1, 0.0)


def test_an_update_that_is_not_finite_is_skipped():
    state, metrics = make_train_step(words, optax.sgd(1e38))(start_of_words(), batch_of(tokens()))
    assert np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all()
    assert metrics["update_norm"] == np.inf
    assert metrics["skipped_steps"] == 1
    np.testing.assert_array_equal(state.params["words"], start_of_words().params["words"])


def test_trains_in_16_bits_with_master_weights_in_32():
    config = model_config("os_gdn", dtype="bfloat16", dropout=0.1)
    apply, parameters = split_model(CausalLM(config, rngs=nnx.Rngs(params=0)))
    optimizer = optax.adam(2e-2)
    step = make_train_step(apply, optimizer, StepConfig(ema=0.9))
    state = TrainState.create(parameters, optimizer, jax.random.key_data(jax.random.key(0)), ema=True)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of(tokens()))
        losses.append(float(metrics["loss"]))
    after = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert after == floats
    assert losses[-1] < losses[0] - 0.5
    gradient = jax.eval_shape(jax.grad(lambda p: likelihood_sums(apply, p, batch_of(tokens())).nats), state.params)
    assert {x.dtype for x in gradient.values()} == {jnp.dtype("float32")}
