"""One compiled program that trains a model from any seed at any learning rate."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.data.recall import TASKS, Recall, Task
from osdn_jax.nn import CausalLM, split_model
from osdn_jax.nn.likelihood import hidden_at
from osdn_jax.sweep.batches import Batch, asked, in_blocks, most_asked, same_asked
from osdn_jax.training import TrainState, build_model_config, build_optimizer, build_step_config, make_train_step
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.tasks import configured_tasks, with_task

MOST_STEPS = 128  # in one call of the program: their batches are in memory together
TEST_PART = 1  # of a task's data: the examples that train.py validates on
TRAINING_PART = 2  # followed by the run's seed and the step


class Curve(NamedTuple):
    """The course of a run.

    Attributes:
        steps: the steps after which it was evaluated; the first is 0, before training.
        accuracy: on the test examples: mean over an example's asked tokens, then over examples.
        test_loss: nats per asked token of the test examples; None where it is not finite.
        train_loss: mean nats per asked token over the training steps since the evaluation before; None at step 0 and
            where it is not finite.
        skipped: steps whose loss, gradient or update was not finite.
        diverged: True if the run ended early, after more of them in a row than config.max_skipped_steps.
    """

    steps: list[int]
    accuracy: list[float]
    test_loss: list[float | None]
    train_loss: list[float | None]
    skipped: int
    diverged: bool


class Trainer:
    """Trains models of one configuration, one after another, without compiling again.

    A run is that of `train` with the same configuration: its initial parameters, optimiser, schedule, loss and skipped
    steps. Every step has new examples, which the seed determines; the test examples are the same for all seeds.

    Args:
        config: with the keys of `default_config`. data.task is what it trains on, and data.validation_examples of
            data.validation_task (default: the same task) are the test examples, evaluated every validation.every
            steps. Not read are seed and optimizer.learning_rate, which `train` takes, and data.task_examples.
        members: train this many seeds at once, by `jax.vmap`; None: one without vmap.

    Raises:
        ValueError: no data.task, or steps are no multiple of validation.every; and as `build_model_config`,
            `build_optimizer` and `build_step_config`.

    Example:
        >>> from osdn_jax.sweep import Trainer
        >>> from osdn_jax.training import default_config
        >>> config = default_config()
        >>> config.data.task, config.data.validation_examples = "mqar:length=16,pairs=2,vocabulary=32", 4
        >>> config.model.layers, config.model.width, config.model.heads, config.model.mlp_dim = 1, 8, 1, 8
        >>> config.batch_size, config.steps, config.validation.every, config.optimizer.warmup_steps = 2, 4, 2, 1
        >>> trainer = Trainer(config)
        >>> [curve] = trainer.train([0], 1e-3)
        >>> curve.steps
        [0, 2, 4]
    """

    def __init__(self, config: ConfigDict, members: int | None = None) -> None:
        """Build the functions; they are compiled on first use."""
        check_config(config)
        self._config = config = with_task(config)
        self._members = members
        self._task, test_task = _tasks(config)
        self._chunk = _chunk(config.validation.every)
        examples = config.data.validation_examples
        test = test_task.generate(examples, part=TEST_PART)
        first = self._examples(0, 0)
        # Equally many questions in all examples, as in MQAR, or room for any number: no block needs another program.
        self._asked = same_asked(first.targets) or config.sequence_length
        self._test = in_blocks(asked(*test, most_asked(test.targets)), min(config.validation.batch_size, examples))
        model = build_model_config(config)
        apply, _ = split_model(nnx.eval_shape(lambda: CausalLM(model, rngs=nnx.Rngs(params=0))))
        start, block, evaluate = _programs(config, apply, members is not None)
        self._start, self._evaluate = jax.jit(start), jax.jit(evaluate)
        self._block = jax.jit(block, donate_argnums=0)

    def train(
        self, seeds: Sequence[int], learning_rate: float, on_steps: Callable[[int], object] = lambda steps: None
    ) -> list[Curve]:
        """Train a model for each seed.

        Args:
            seeds: one, or as many as `members`.
            learning_rate: the peak of the schedule.
            on_steps: called with the number of steps done since the call before.

        Returns:
            The curve of each seed.
        """
        rate = np.float32(learning_rate)
        state = self._start(self._each([np.uint32(seed) for seed in seeds]), rate)
        rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]] = [(0, *self._tested(state), None)]
        skipped = np.zeros(len(seeds), np.int32)
        every = self._config.validation.every
        for first in range(0, self._config.steps, every):
            losses = []
            for step in range(first, first + every, self._chunk):
                batches = [self._batches(seed, step) for seed in seeds]
                state, loss = self._block(state, {k: self._each([b[k] for b in batches]) for k in batches[0]}, rate)
                losses.append(np.reshape(np.asarray(loss), (len(seeds), -1)))
                on_steps(self._chunk)
            mean = np.mean(np.concatenate(losses, axis=1), axis=1)
            rows.append((first + every, *self._tested(state), mean))
            skipped = np.atleast_1d(state.skipped)
            diverged = np.atleast_1d(state.skipped_in_a_row) > self._config.max_skipped_steps
            if diverged.all():
                break
        return [
            Curve(
                [row[0] for row in rows],
                [float(row[1][i]) for row in rows],
                [_finite(row[2][i]) for row in rows],
                [None if row[3] is None else _finite(row[3][i]) for row in rows],
                int(skipped[i]),
                bool(diverged[i]),
            )
            for i in range(len(seeds))
        ]

    def _each(self, values: Sequence[Any]) -> Any:
        return values[0] if self._members is None else np.stack(values)

    def _batches(self, seed: int, step: int) -> Batch:
        """Return the examples of the next steps, [steps, B, ...]."""
        examples = self._examples(seed, step)
        self._asked = max(self._asked, most_asked(examples.targets))
        return in_blocks(asked(*examples, self._asked), self._config.batch_size)

    def _examples(self, seed: int, step: int) -> Recall:
        part = (self._task.seed, TRAINING_PART, seed, step)
        count = self._config.batch_size * self._chunk
        return TASKS[self._task.name](count, **self._task.options, seed=part)

    def _tested(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        accuracy, loss = self._evaluate(state.evaluated, self._test)
        return np.atleast_1d(accuracy), np.atleast_1d(loss)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no infinity


def check_config(config: ConfigDict) -> None:
    """Raise ValueError, naming the key, for a configuration that `Trainer` cannot train."""
    check_ranges(config)
    config = with_task(config)
    _tasks(config)
    for axis, size in config.mesh.items():
        if size != 1:
            raise ValueError(f"mesh.{axis}: got {size}, expected 1: a run of a sweep is on one device")
    if config.steps % config.validation.every:
        raise ValueError(
            f"steps: got {config.steps}, expected a multiple of validation.every = {config.validation.every}"
        )
    model = build_model_config(config)
    build_optimizer(config, nnx.eval_shape(lambda: CausalLM(model, rngs=nnx.Rngs(params=0))))
    build_step_config(config)


def _tasks(config: ConfigDict) -> tuple[Task, Task]:
    tasks = configured_tasks(config)
    if tasks is None:
        raise ValueError("data.task: got None, expected a recall task, such as mqar:length=64,pairs=8")
    return tasks


def _chunk(every: int) -> int:
    """Return the number of steps in one call of the program: a divisor of `every`."""
    return max(n for n in range(1, min(every, MOST_STEPS) + 1) if every % n == 0)


def _programs(config: ConfigDict, apply: Callable[..., Any], members: bool) -> tuple[Callable[..., Any], ...]:
    """Return the functions (start, block, evaluate) of a run, over a leading axis of members if there is one."""
    model_config, step_config = build_model_config(config), build_step_config(config)

    def build(seed: jax.Array) -> CausalLM:
        return CausalLM(model_config, rngs=nnx.Rngs(params=jax.random.key(seed)))

    model = nnx.eval_shape(build, np.uint32(0))

    def start(seed: jax.Array, rate: jax.Array) -> TrainState:
        random = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
        optimizer = build_optimizer(config, model, learning_rate=rate)
        return TrainState.create(split_model(build(seed))[1], optimizer, random, ema=config.ema > 0)

    def block(state: TrainState, batches: Batch, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        step = make_train_step(apply, build_optimizer(config, model, learning_rate=rate), step_config)

        def one(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, batches)

    def evaluate(params: dict[str, jax.Array], test: Batch) -> tuple[jax.Array, jax.Array]:
        def one(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            hidden, _ = apply(params, batch["inputs"], segment_ids=batch["segment_ids"], method="features")
            unembedding = apply(params, method="unembedding").astype(hidden.dtype)
            hidden, weights = hidden_at(hidden, batch["positions"]), batch["weights"]
            logits = jnp.einsum("bnd,vd->bnv", hidden, unembedding, preferred_element_type=jnp.float32)
            label = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
            nats = (jax.nn.logsumexp(logits, axis=-1) - label) * weights
            right = jnp.where(jnp.argmax(logits, axis=-1) == batch["targets"], weights, 0.0)
            count = jnp.sum(weights, axis=1)
            return jnp.sum(right, axis=1) / jnp.maximum(count, 1.0), jnp.sum(nats), count

        accuracy, nats, count = jax.lax.map(one, test)
        return jnp.sum(accuracy) / jnp.sum(jnp.sign(count)), jnp.sum(nats) / jnp.sum(count)

    if not members:
        return start, block, evaluate
    over = jax.vmap
    return over(start, (0, None)), over(block, (0, 0, None)), over(evaluate, (0, None))
