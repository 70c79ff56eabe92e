"""The training loop."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from rich.console import Console

from osdn_jax.data import ValidationBatches, Window, WindowSource, training_batches, validation_batches
from osdn_jax.data.tokenizers import BYTES
from osdn_jax.hardware import peak_flops
from osdn_jax.nn import count_parameters
from osdn_jax.nn.flops import per_token
from osdn_jax.nn.split import split_model
from osdn_jax.progress import ProgressBar, Stopwatch, say
from osdn_jax.training import agreement, distributed
from osdn_jax.training.build import build_schedule, build_step_config
from osdn_jax.training.checkpoints import CheckpointError, Checkpoints
from osdn_jax.training.config import MAY_CHANGE_ON_RESUME, ConfigError
from osdn_jax.training.data import Data, build_data
from osdn_jax.training.initial_state import plan_start
from osdn_jax.training.interruption import Interrupted, Stop, Watchdog
from osdn_jax.training.limits import check_memory, out_of_memory
from osdn_jax.training.lock import WorkdirLock
from osdn_jax.training.mesh import Layout, build_mesh, describe
from osdn_jax.training.metrics import MetricsWriter, read_metrics
from osdn_jax.training.model_config import model_name
from osdn_jax.training.plots import plot_loss
from osdn_jax.training.profiling import Profile
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.starting_point import Origin, RunOrigin, origin_of, with_init
from osdn_jax.training.step import TrainState, make_train_step
from osdn_jax.training.tasks import with_task
from osdn_jax.training.validation import ACCURACY, BITS_PER_BYTE, HeldOut, make_validate
from osdn_jax.training.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, check_workdir, checked_workdir

if TYPE_CHECKING:
    import grain


class DataError(RuntimeError):
    """The data cannot be read any further: a damaged file, or a hub that no longer answers."""


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss, gradient or update that is not finite."""


class Result(NamedTuple):
    """The outcome of a run.

    Attributes:
        step: the last step done.
        parameters: number of trainable parameters.
        bits_per_byte: on the held-out text, or per answer of a recall task; None before the last step.
        tokens_per_second: in this process, without compilation, validation and saving; None if nothing was measured.
    """

    step: int
    parameters: int
    bits_per_byte: float | None
    tokens_per_second: float | None


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    stop_at: int | None = None,
    start_from: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    on_metrics: Callable[[int, dict[str, float]], object] | None = None,
) -> Result:
    """Train the model of a configuration, or resume the run in `workdir`.

    Writes config.json, checkpoints, metrics.jsonl, TensorBoard event files and loss.png to `workdir`. Training runs
    over the mesh of config.mesh; every process of a job calls this function with the same arguments, and all of them
    can reach `workdir`. SIGTERM and Ctrl-C end the run after the current step, with a checkpoint, as `stop_at` does.
    `workdir` is locked while it trains: no other run can use it.

    Args:
        config: with the keys of `default_config`.
        workdir: the run's directory; created if missing.
        stop_at: stop after this step and save a checkpoint, e.g. on time-limited allocations; default: config.steps.
        start_from: directory of another run, with the same model and tokenizer: a new run starts from the parameters of
            its newest checkpoint (their moving average if it has one), with a new optimiser state, schedule and data
            order. Ignored once `workdir` has a checkpoint. Default: random parameters.
        profile: first and last step of a trace, written to `workdir`/profile; default: no trace.
        on_metrics: called as on_metrics(step, values) for every row of metrics.jsonl, training rows and validation
            rows, right after the row is written; values is a new dict of floats, {"train/bits_per_byte": 2.1, …}. Only
            the process that writes metrics.jsonl (process 0) calls it. Its exceptions end the run. Rows that a resumed
            run repeats, because it was killed after its last checkpoint, are passed again.

    Returns:
        The last step and, at the end of the run, the bits per byte of the held-out text.

    Raises:
        ConfigError: the configuration, the data or the directory cannot be used; the message says why. In a job of
            several processes every process raises it if one of them failed or was given other arguments.
            WorkdirInUseError, a subclass: another run is using the directory.
        Interrupted: Ctrl-C, once everything is saved; a KeyboardInterrupt that has the result.
        DataError: the data cannot be read any further.
        DivergedError: more than config.max_skipped_steps steps in a row had a loss, gradient or update that is not
            finite; names the last of them. Checkpoints stay as they were.
        CheckpointError: as `Checkpoints`.
        CheckpointMismatchError: the checkpoints are of another model, text or tokenizer, or the run in start_from is of
            another model or tokenizer.
        OSError: a file cannot be written, e.g. because the disk is full; names the file.
        TypeError: on_metrics is not callable.

    Example:
        >>> import tempfile
        >>> from osdn_jax.training import default_config, train
        >>> config = default_config()
        >>> config.model.rule = "delta_net"
        >>> config.model.layers = config.batch_size = 1
        >>> config.model.width = config.model.mlp_dim = config.sequence_length = 8
        >>> rows = []
        >>> result = train(
        ...     config, tempfile.mkdtemp(), stop_at=1, on_metrics=lambda step, values: rows.append((step, values))
        ... )  # doctest: +ELLIPSIS
        delta_net: 2,636 parameters; 4.54 MB of text to train on, 0.51 MB held out; 1 ...
        step 1 of 1,000  the first step took ... s
        >>> result.step, [(step, values["train/skipped_steps"]) for step, values in rows]
        (1, [(1, 0.0)])
    """
    if on_metrics is not None and not callable(on_metrics):
        raise TypeError(f"on_metrics: got {on_metrics!r}, expected a callable (step, values) or None")
    try:
        with contextlib.ExitStack() as resources:
            return _train(config, workdir, stop_at, start_from, profile, on_metrics, resources)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        message = out_of_memory(error)
        if message is None:
            raise
        raise ConfigError(message) from error


def _train(
    config: ConfigDict,
    workdir: str | Path,
    stop_at: int | None,
    start_from: str | Path | None,
    profile: tuple[int, int] | None,
    on_metrics: Callable[[int, dict[str, float]], object] | None,
    resources: contextlib.ExitStack,
) -> Result:
    """As `train`; the lock of the directory is entered into `resources`."""
    # --- Build everything that can fail in one process alone.
    workdir, primary = checked_workdir(workdir), distributed.is_primary()
    try:
        _check(config, stop_at)
        config = with_init(with_task(config), workdir)
        layout = Layout(build_mesh(config))
        check_memory(config)
        model, optimizer, create = plan_start(config, layout)
        step_config = build_step_config(config)
        schedule = jax.jit(build_schedule(config))  # one program, not one for each of its operations
        data = build_data(config)
        batches, held_out = _batches(config, data, layout)
        origin = origin_of(config, start_from, data)
    except BaseException as error:  # noqa: BLE001 (whatever it is, the other processes must not wait for it)
        agreement.fail(error)

    # --- Agree with the other processes and take the directory.
    run = agreement.describe(
        config,
        workdir=str(workdir.absolute()),
        stop_at=stop_at,
        start_from=str(origin.folder) if isinstance(origin, RunOrigin) else None,
        **data.fingerprints,
    )
    agreement.agree(run)

    def open_workdir() -> None:
        resources.enter_context(WorkdirLock(workdir))
        check_workdir(workdir, config, may_differ=MAY_CHANGE_ON_RESUME)

    agreement.by_first(open_workdir, workdir / CONFIG_FILE)

    with (
        Stop() as stop,  # first: from here on, an interrupted process takes the others with it
        Checkpoints(
            workdir / CHECKPOINT_FOLDER,
            max_to_keep=config.checkpoint.keep,
            keep_period=config.checkpoint.keep_every,
            fingerprints=data.fingerprints,
        ) as checkpoints,
        Watchdog(config.hang_seconds) as watchdog,
    ):
        # --- Create the state, or restore it.
        apply, _ = split_model(model)
        validate = make_validate(apply, model.config, step_config, data, held_out, layout, watchdog)
        parameters = count_parameters(model)
        state, shardings = create()
        train_step = make_train_step(apply, optimizer, step_config, shardings=shardings)
        flops = per_token(model.config, state.params, config.sequence_length).training
        del model, create  # they hold the initial parameters
        state, start, messages = _restored(checkpoints, state, batches, workdir, origin)
        if primary:
            for message in messages:
                say(message)
            say(f"{model_name(config)}: {parameters:,} parameters; {data.summary}; {describe(layout.mesh)}")
            if start:
                say(f"going on from the checkpoint of step {start:,} of {config.steps:,}")

        # --- Train.
        end = config.steps if stop_at is None else min(stop_at, config.steps)
        clock = Stopwatch()
        tokens_per_step = config.batch_size * config.sequence_length
        bits, step = None, start
        pending = None  # (step, metrics on the device), read while the next step runs
        unit = "byte" if data.questions is None else "answer"
        with (
            _metrics(workdir, start, primary, on_metrics) as metrics,
            ProgressBar(
                config.steps,
                start_step=start,
                unit=unit,
                console=None if primary else Console(quiet=True),
            ) as bar,
            Profile(workdir / "profile", profile) as trace,
        ):
            for step in range(start + 1, end + 1):
                trace.before(step)
                with layout.active():
                    state, measured = train_step(state, layout.batch(_next(batches)))
                trace.after(step, measured)
                if pending is not None:
                    numbers = _numbers(*pending, checkpoints, config.max_skipped_steps)
                    bits = numbers["loss"] / np.log(2.0) * data.tokens_per_byte
                pending = (step, measured)
                watchdog.beat()
                if step == start + 1:
                    jax.block_until_ready(measured)
                    clock.start()  # the first step compiled
                bar.update(step, tokens=tokens_per_step, bits_per_byte=bits)

                # --- Now and then: log, validate, save.
                stopped = stop.reached(step)
                last, ends = step == config.steps, step == end or stopped
                logs = step % config.log_every == 0 or ends
                validates = step % config.validation.every == 0 or last
                saves = step % config.checkpoint.every == 0 or ends
                if not (logs or validates or saves):
                    continue
                numbers, pending = _numbers(step, measured, checkpoints, config.max_skipped_steps), None
                tokens = {"tokens": step * tokens_per_step}
                if logs:
                    speed = clock.rate((step - start - 1) * tokens_per_step)
                    row = _train_row(config, step, numbers, data.tokens_per_byte, schedule)
                    metrics.write(step, tokens | row | _speed_row(speed, flops, layout.devices))
                with clock.paused():
                    if validates:
                        row = validate(state.evaluated, last)
                        metrics.write(step, tokens | row)
                        bar.print(f"step {step:,}: {_validated(row, 'all' if last else 'part')}")
                    if saves:
                        checkpoints.save(step, state, batches)
                if stopped and step < end:
                    by = "Ctrl-C" if stop.interrupted else "SIGTERM"
                    bar.print(f"step {step:,}: asked to stop by {by}; saved")
                    break

    # --- Report.
    rows = read_metrics(workdir) if primary else []
    if rows:
        plot_loss({model_name(config): rows}, workdir / "loss.png", unit=unit)
    finals = [row[BITS_PER_BYTE] for row in rows if row["step"] == config.steps and BITS_PER_BYTE in row]
    result = Result(
        step=int(state.step),
        parameters=parameters,
        bits_per_byte=finals[-1] if finals else None,
        tokens_per_second=clock.rate((step - start - 1) * tokens_per_step),
    )
    if stop.interrupted:
        raise Interrupted(result)
    return result


# Before the first step


def _check(config: ConfigDict, stop_at: int | None) -> None:
    """Raise ValueError for a number out of range."""
    check_ranges(config)
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at: got {stop_at}, expected at least 1")


def _batches(config: ConfigDict, data: Data, layout: Layout) -> "tuple[grain.DatasetIterator, HeldOut]":
    """Return this process's share of the training batches and of the held-out windows."""
    index, count = layout.share
    share = {"shard_index": index, "shard_count": count}
    batches = training_batches(data.train, batch_size=config.batch_size // count, seed=config.seed, **share)
    rows_here = config.validation.batch_size // count
    everything = validation_batches(data.held_out, batch_size=rows_here, **share)
    some = _spread(data.held_out, config.validation.windows, rows_here, **share)
    return batches, HeldOut(everything, some)


def _spread(source: WindowSource, count: int, batch_size: int, **share: int) -> ValidationBatches:
    """Batch `count` windows spread evenly over a source, or all if count is 0 or exceeds their number."""
    total = len(source)
    if not 0 < count < total:
        return validation_batches(source, batch_size=batch_size, **share)
    rows = [source[i * total // count] for i in range(count)]
    return validation_batches(rows, batch_size=batch_size, **share)


def _restored(
    checkpoints: Checkpoints,
    state: TrainState,
    batches: "grain.DatasetIterator",
    workdir: Path,
    origin: Origin | None,
) -> tuple[TrainState, int, list[str]]:
    """Restore the newest checkpoint, or else the parameters of the origin: (state, its step, messages)."""
    restored = checkpoints.restore(state, batches)
    if restored is None:
        if origin is None:
            return state, 0, []
        state, message = origin.start(state)
        return state, 0, [message]
    start = int(restored.state.step)
    if restored.step != start:
        folder = workdir / CHECKPOINT_FOLDER / str(restored.step)
        raise CheckpointError(f"{folder} is a checkpoint of step {start} under another name; rename or remove it")
    return restored.state, start, [f"warning: {warning}" for warning in restored.warnings]


def _metrics(
    workdir: Path,
    start: int,
    primary: bool,
    on_metrics: Callable[[int, dict[str, float]], object] | None = None,
) -> MetricsWriter:
    """Open the metrics of a run that starts or resumes at step `start`.

    Raises ConfigError if the file is damaged and OSError if it cannot be written; of several processes, every process
    raises ConfigError.
    """
    try:
        metrics = MetricsWriter(
            workdir, resume_step=start if start else None, enabled=primary, on_metrics=on_metrics if primary else None
        )
    except ValueError as error:
        advice = "mend or remove that line, or remove the file to go on without it"
        agreement.fail(ConfigError(f"{error}; {advice}"))
    except OSError as error:
        if jax.process_count() == 1:
            raise
        agreement.fail(error)
    agreement.agree({})
    return metrics


# In the loop


def _next(batches: Iterator[Window]) -> Window:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read on: {error}") from error


def _numbers(
    step: int, measured: dict[str, jax.Array], checkpoints: Checkpoints, max_skipped_steps: int
) -> dict[str, float]:
    """Read the step's metrics from the device. Raises DivergedError if too many steps in a row were skipped."""
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


def _train_row(
    config: ConfigDict, step: int, numbers: Mapping[str, float], tokens_per_byte: float, schedule: optax.Schedule
) -> dict[str, float]:
    """Return the metrics of a training step under their names in metrics.jsonl."""
    bits_per_token = numbers["loss"] / np.log(2.0)
    skipped = int(numbers["skipped_steps"])
    row = {
        "train/bits_per_byte": bits_per_token * tokens_per_byte,
        "train/gradient_norm": numbers["gradient_norm"],
        "train/update_norm": numbers["update_norm"],
        "train/parameter_norm": numbers["parameter_norm"],
        "train/skipped_steps": skipped,
        "train/learning_rate": float(schedule(max(step - 1 - skipped, 0))),
    }
    if config.data.tokenizer != BYTES:
        row["train/bits_per_token"] = bits_per_token
    if "balance" in numbers:
        row["train/balance"] = numbers["balance"]
    return row


def _validated(row: Mapping[str, float], part: str) -> str:
    """Return a validation as text; part: all or part of the held-out text or examples."""
    if ACCURACY in row:
        bits = f"{row[BITS_PER_BYTE]:.4f} bits per answer, {row[ACCURACY]:.2%} right"
        return f"{bits}, on {part} of the held-out examples"
    return f"{row[BITS_PER_BYTE]:.4f} bits per byte on {part} of the held-out text"


def _speed_row(speed: float | None, flops: float, devices: int) -> dict[str, float]:
    """Return tokens per second and, on a GPU of known peak, the model FLOPs utilisation."""
    if speed is None:
        return {}
    peak = peak_flops(jax.devices()[0].device_kind)
    return {"tokens_per_second": speed} | ({} if peak is None else {"mfu": speed * flops / (peak * devices)})
