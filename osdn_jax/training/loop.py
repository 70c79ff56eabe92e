"""The training loop."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from osdn_jax.data import ValidationBatches, WindowSource, training_batches, validation_batches
from osdn_jax.data.tokenizers import BYTES
from osdn_jax.evaluation import make_evaluate
from osdn_jax.nn import count_parameters
from osdn_jax.nn.functional import functional
from osdn_jax.training.build import build_model, build_optimizer, build_schedule, build_step_config, random_state
from osdn_jax.training.checkpoints import Checkpoints
from osdn_jax.training.config import CHECKPOINT_FOLDER, ConfigError, check_workdir
from osdn_jax.training.defaults import MAY_CHANGE_ON_RESUME
from osdn_jax.training.metrics import MetricsWriter, read_metrics
from osdn_jax.training.plots import plot_loss
from osdn_jax.training.progress import ProgressBar
from osdn_jax.training.sources import build_data
from osdn_jax.training.step import TrainState, make_train_step
from osdn_jax.training.stopwatch import Stopwatch

_VALIDATION = "validation/bits_per_byte"  # its key in metrics.jsonl


class DivergedError(RuntimeError):
    """The loss, the gradient or the update is no longer a finite number, and skipping steps has not helped."""


class Result(NamedTuple):
    """What a run came to."""

    step: int
    parameters: int
    bits_per_byte: float | None  # on the held-out text, if the run came to its end
    tokens_per_second: float | None  # in this process, without compilation, validation and saving


def train(config: ConfigDict, workdir: str | Path, *, stop_at: int | None = None) -> Result:
    """Trains the model of a configuration, or goes on where the run in workdir stopped.

    Writes config.json, checkpoints, metrics.jsonl, TensorBoard event files and loss.png to workdir.

    Args:
        config: as `default_config` lists it.
        workdir: the run's own directory; made if need be.
        stop_at: end after this step, with a checkpoint, as if interrupted; for machines lent by the hour.

    Raises:
        ConfigError: the configuration, the data or the directory cannot be used; the message says why.
        DivergedError: more than config.max_skipped_steps steps in a row had no finite loss, gradient or update; names
            the last of them. Checkpoints stay as they were.
        CheckpointError, CheckpointMismatchError: as `Checkpoints`.
    """
    workdir = Path(workdir)
    try:
        _check(config, stop_at)
        model = build_model(config)
        optimizer = build_optimizer(config, model)
        step_config = build_step_config(config)
        schedule = jax.jit(build_schedule(config))  # one program, not one for each of its operations
        data = build_data(config)
        batches = training_batches(data.train, batch_size=config.batch_size, seed=config.seed)
        everything = validation_batches(data.held_out, batch_size=config.validation.batch_size)
        some = _spread(data.held_out, config.validation.windows, config.validation.batch_size)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    check_workdir(workdir, config, may_differ=MAY_CHANGE_ON_RESUME)

    apply, params = functional(model)
    state = TrainState.create(params, optimizer, random_state(config), ema=config.ema > 0)
    train_step = make_train_step(apply, optimizer, step_config)
    evaluate = make_evaluate(apply, step_config.chunks)
    parameters = count_parameters(model)
    del model, params

    with Checkpoints(workdir / CHECKPOINT_FOLDER, max_to_keep=config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore(state, batches)
        if restored is not None:
            state = restored.state
            for warning in restored.warnings:
                print(f"warning: {warning}")
        start = int(state.step)
        end = config.steps if stop_at is None else min(stop_at, config.steps)
        _announce(config, parameters, data.summary, start)
        clock = Stopwatch()
        tokens_per_step = config.batch_size * config.sequence_length
        bits = None
        with (
            MetricsWriter(workdir, resume_step=start if start else None) as metrics,
            ProgressBar(config.steps, start_step=start) as bar,
        ):
            waiting = None
            for step in range(start + 1, end + 1):
                state, measured = train_step(state, next(batches))
                if waiting is not None:
                    # Of the step before, while this one runs.
                    numbers = _numbers(*waiting, checkpoints, config.max_skipped_steps)
                    bits = numbers["loss"] / np.log(2.0) * data.tokens_per_byte
                waiting = (step, measured)
                if step == start + 1:
                    jax.block_until_ready(measured)
                    clock.start()  # the first step compiled
                bar.update(step, tokens=tokens_per_step, bits_per_byte=bits)

                last = step == config.steps
                logs = step % config.log_every == 0 or step == end
                validates = step % config.validation.every == 0 or last
                saves = step % config.checkpoint.every == 0 or step == end
                if not (logs or validates or saves):
                    continue
                numbers, waiting = _numbers(step, measured, checkpoints, config.max_skipped_steps), None
                tokens = {"tokens": step * tokens_per_step}
                if logs:
                    bits_per_token = numbers["loss"] / np.log(2.0)
                    row = {
                        "train/bits_per_byte": bits_per_token * data.tokens_per_byte,
                        "train/gradient_norm": numbers["gradient_norm"],
                        "train/update_norm": numbers["update_norm"],
                        "train/parameter_norm": numbers["parameter_norm"],
                        "train/skipped_steps": int(numbers["skipped_steps"]),
                        "train/learning_rate": float(schedule(max(step - 1 - int(numbers["skipped_steps"]), 0))),
                    }
                    if config.data.tokenizer != BYTES:
                        row["train/bits_per_token"] = bits_per_token
                    speed = clock.rate((step - start - 1) * tokens_per_step)
                    metrics.write(step, tokens | row | ({} if speed is None else {"tokens_per_second": speed}))
                with clock.paused():
                    if validates:
                        # Of a part it is an estimate: the part's tokens may be longer or shorter than all of them are.
                        bits_now = evaluate(state.evaluated, everything if last else some)
                        bits_now *= data.held_out_tokens_per_byte
                        metrics.write(step, tokens | {_VALIDATION: bits_now})
                        part = "all" if last else "part"
                        bar.print(f"step {step:,}: {bits_now:.4f} bits per byte on {part} of the held-out text")
                    if saves:
                        checkpoints.save(step, state, batches)
    rows = read_metrics(workdir)
    if rows:
        plot_loss({config.model.rule: rows}, workdir / "loss.png")
    finals = [row[_VALIDATION] for row in rows if row["step"] == config.steps and _VALIDATION in row]
    return Result(
        step=int(state.step),
        parameters=parameters,
        bits_per_byte=finals[-1] if finals else None,
        tokens_per_second=clock.rate((end - start - 1) * tokens_per_step),
    )


def _numbers(
    step: int, measured: dict[str, jax.Array], checkpoints: Checkpoints, max_skipped_steps: int
) -> dict[str, float]:
    """The step's metrics as numbers. Raises DivergedError if it is one too many that was skipped."""
    numbers = {name: float(x) for name, x in measured.items()}
    skipped = int(numbers["skipped_in_a_row"])
    if skipped <= max_skipped_steps:
        return numbers
    wrong = ", ".join(f"{name} is {x}" for name, x in numbers.items() if not np.isfinite(x))
    kept = checkpoints.latest_step
    where = "there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is kept"
    raise DivergedError(
        f"step {step}: {wrong}, which makes {skipped} skipped in a row (max_skipped_steps = {max_skipped_steps}); "
        f"{where}. A lower --config.optimizer.learning_rate, a longer --config.optimizer.warmup_steps or a smaller "
        "--config.optimizer.clip_norm may help."
    )


def _check(config: ConfigDict, stop_at: int | None) -> None:
    """Raises ValueError for a count out of range."""
    counts = {
        "steps": config.steps,
        "log_every": config.log_every,
        "validation.every": config.validation.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "stop_at": 1 if stop_at is None else stop_at,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if config.max_skipped_steps < 0:
        raise ValueError(f"max_skipped_steps: got {config.max_skipped_steps}, expected at least 0")


def _spread(source: WindowSource, count: int, batch_size: int) -> ValidationBatches:
    """Batches of count windows spread evenly over a source; all of it if count is 0 or more than there are."""
    total = len(source)
    if not 0 < count < total:
        return validation_batches(source, batch_size=batch_size)
    rows = [source[i * total // count] for i in range(count)]
    return validation_batches(rows, batch_size=batch_size)


def _announce(config: ConfigDict, parameters: int, text: str, start: int) -> None:
    print(
        f"{config.model.rule}: {parameters:,} parameters; {text}; "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    )
    if start:
        print(f"going on from the checkpoint of step {start:,} of {config.steps:,}")
