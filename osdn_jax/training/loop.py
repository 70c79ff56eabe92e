"""The training loop."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from osdn_jax.data import ValidationBatches, Window, WindowSource, training_batches, validation_batches
from osdn_jax.data.tokenizers import BYTES
from osdn_jax.evaluation import make_evaluate
from osdn_jax.hardware import peak_flops
from osdn_jax.nn import count_parameters
from osdn_jax.nn.flops import per_token
from osdn_jax.nn.split import split_model
from osdn_jax.progress import ProgressBar, Stopwatch, say
from osdn_jax.training import agreement, distributed
from osdn_jax.training.build import build_schedule, build_step_config
from osdn_jax.training.checkpoints import CheckpointError, Checkpoints
from osdn_jax.training.config import MAY_CHANGE_ON_RESUME, ConfigError
from osdn_jax.training.data import build_data
from osdn_jax.training.initial_state import plan_start
from osdn_jax.training.interruption import Interrupted, Stop, Watchdog
from osdn_jax.training.limits import check_memory, out_of_memory
from osdn_jax.training.lock import WorkdirLock
from osdn_jax.training.mesh import Layout, build_mesh, describe
from osdn_jax.training.metrics import MetricsWriter, read_metrics
from osdn_jax.training.plots import plot_loss
from osdn_jax.training.profiling import Profile
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.step import make_train_step
from osdn_jax.training.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, check_workdir, checked_workdir

_VALIDATION = "validation/bits_per_byte"  # its key in metrics.jsonl
_STATISTICS_TOKENS = 1024  # that the preconditioners are looked at over


class DataError(RuntimeError):
    """The text cannot be read any further: a damaged file, a hub that no longer answers."""


class DivergedError(RuntimeError):
    """The loss, the gradient or the update is no longer a finite number, and skipping steps has not helped."""


class Result(NamedTuple):
    """What a run came to."""

    step: int
    parameters: int
    bits_per_byte: float | None  # on the held-out text, if the run came to its end
    tokens_per_second: float | None  # in this process, without compilation, validation and saving


def train(
    config: ConfigDict, workdir: str | Path, *, stop_at: int | None = None, profile: tuple[int, int] | None = None
) -> Result:
    """Trains the model of a configuration, or goes on where the run in workdir stopped.

    Writes config.json, checkpoints, metrics.jsonl, TensorBoard event files and loss.png to workdir. It runs over the
    mesh of config.mesh; every process of a job calls it with the same arguments, and all of them can reach workdir.
    SIGTERM and Ctrl-C end it after the step under way, with a checkpoint, as stop_at does. While it trains, workdir is
    locked: no other run can use it.

    Args:
        config: as `default_config` lists it.
        workdir: the run's own directory; made if need be.
        stop_at: end after this step, with a checkpoint, as if interrupted; for machines lent by the hour.
        profile: first and last step of a trace, which goes to workdir/profile.

    Raises:
        ConfigError: the configuration, the data or the directory cannot be used; the message says why. Of several
            processes, one of them has failed, or was told something else; each raises it.
            WorkdirInUseError, which is one: another run has the directory.
        Interrupted: Ctrl-C, once all is saved; a KeyboardInterrupt that has the result.
        DataError: the data cannot be read any further.
        DivergedError: more than config.max_skipped_steps steps in a row had no finite loss, gradient or update; names
            the last of them. Checkpoints stay as they were.
        CheckpointError: as `Checkpoints`.
        CheckpointMismatchError: the checkpoints are of another model, text or tokenizer.
        OSError: something cannot be written, such as on a full disk; names the file.
    """
    try:
        with contextlib.ExitStack() as held:
            return _train(config, workdir, stop_at, profile, held)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise ConfigError(said) from error


def _train(
    config: ConfigDict,
    workdir: str | Path,
    stop_at: int | None,
    profile: tuple[int, int] | None,
    held: contextlib.ExitStack,
) -> Result:
    """As `train`; held: closed after it, holds the lock of the directory."""
    workdir, primary = checked_workdir(workdir), distributed.is_primary()
    try:
        _check(config, stop_at)
        layout = Layout(build_mesh(config))
        check_memory(config)
        model, optimizer, create = plan_start(config, layout)
        step_config = build_step_config(config)
        schedule = jax.jit(build_schedule(config))  # one program, not one for each of its operations
        data = build_data(config)
        index, count = layout.share
        share = {"shard_index": index, "shard_count": count}
        batches = training_batches(data.train, batch_size=config.batch_size // count, seed=config.seed, **share)
        rows_here = config.validation.batch_size // count
        everything = validation_batches(data.held_out, batch_size=rows_here, **share)
        some = _spread(data.held_out, config.validation.windows, rows_here, **share)
    except BaseException as error:  # noqa: BLE001 (whatever it is, the other processes must not wait for it)
        agreement.fail(error)
    run = agreement.describe(config, workdir=str(workdir.absolute()), stop_at=stop_at, **data.fingerprints)
    agreement.agree(run)

    def open_workdir() -> None:
        held.enter_context(WorkdirLock(workdir))
        check_workdir(workdir, config, may_differ=MAY_CHANGE_ON_RESUME)

    agreement.by_first(open_workdir, workdir / CONFIG_FILE)

    apply, _ = split_model(model)
    evaluate = make_evaluate(apply, step_config.chunks)
    statistics = _make_statistics(apply, model.config.mixer, layout)
    parameters = count_parameters(model)
    peak = peak_flops(jax.devices()[0].device_kind)

    with (
        Stop() as stop,  # first: from here on, a process that is interrupted takes the others with it
        Checkpoints(
            workdir / CHECKPOINT_FOLDER,
            max_to_keep=config.checkpoint.keep,
            keep_period=config.checkpoint.keep_every,
            fingerprints=data.fingerprints,
        ) as checkpoints,
        Watchdog(config.hang_seconds) as watchdog,
    ):
        state, shardings = create()
        train_step = make_train_step(apply, optimizer, step_config, shardings=shardings)
        flops = per_token(model.config, state.params, config.sequence_length).training
        del model, create
        restored = checkpoints.restore(state, batches)
        if restored is not None:
            state = restored.state
        start = int(state.step)
        if restored is not None and restored.step != start:
            folder = workdir / CHECKPOINT_FOLDER / str(restored.step)
            raise CheckpointError(f"{folder} is a checkpoint of step {start} under another name; rename or remove it")
        if primary:
            for warning in () if restored is None else restored.warnings:
                say(f"warning: {warning}")
            say(f"{config.model.rule}: {parameters:,} parameters; {data.summary}; {describe(layout.mesh)}")
            if start:
                say(f"going on from the checkpoint of step {start:,} of {config.steps:,}")
        end = config.steps if stop_at is None else min(stop_at, config.steps)
        clock = Stopwatch()
        tokens_per_step = config.batch_size * config.sequence_length
        bits, step = None, start
        with (
            _metrics(workdir, start, primary) as metrics,
            ProgressBar(config.steps, start_step=start, console=None if primary else Console(quiet=True)) as bar,
            Profile(workdir / "profile", profile) as trace,
        ):
            waiting = None
            for step in range(start + 1, end + 1):
                trace.before(step)
                with layout.active():
                    state, measured = train_step(state, layout.batch(_next(batches)))
                trace.after(step, measured)
                if waiting is not None:
                    # Of the step before, while this one runs.
                    numbers = _numbers(*waiting, checkpoints, config.max_skipped_steps)
                    bits = numbers["loss"] / np.log(2.0) * data.tokens_per_byte
                waiting = (step, measured)
                watchdog.beat()
                if step == start + 1:
                    jax.block_until_ready(measured)
                    clock.start()  # the first step compiled
                bar.update(step, tokens=tokens_per_step, bits_per_byte=bits)

                stopped = stop.reached(step)
                last, ends = step == config.steps, step == end or stopped
                logs = step % config.log_every == 0 or ends
                validates = step % config.validation.every == 0 or last
                saves = step % config.checkpoint.every == 0 or ends
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
                    if speed is not None:
                        row["tokens_per_second"] = speed
                        if peak is not None:
                            row["mfu"] = speed * flops / (peak * layout.devices)
                    metrics.write(step, tokens | row)
                with clock.paused():
                    if validates:
                        # Of a part it is an estimate: the part's tokens may be longer or shorter than all of them are.
                        held_out = _placed(everything if last else some, layout, watchdog)
                        with layout.active():
                            bits_now = evaluate(state.evaluated, held_out) * data.held_out_tokens_per_byte
                        row = {_VALIDATION: bits_now} | statistics(state.evaluated, data.held_out[0])
                        metrics.write(step, tokens | row)
                        part = "all" if last else "part"
                        bar.print(f"step {step:,}: {bits_now:.4f} bits per byte on {part} of the held-out text")
                    if saves:
                        checkpoints.save(step, state, batches)
                if stopped and step < end:
                    by = "Ctrl-C" if stop.interrupted else "SIGTERM"
                    bar.print(f"step {step:,}: asked to stop by {by}; saved")
                    break
    rows = read_metrics(workdir) if primary else []
    if rows:
        plot_loss({config.model.rule: rows}, workdir / "loss.png")
    finals = [row[_VALIDATION] for row in rows if row["step"] == config.steps and _VALIDATION in row]
    result = Result(
        step=int(state.step),
        parameters=parameters,
        bits_per_byte=finals[-1] if finals else None,
        tokens_per_second=clock.rate((step - start - 1) * tokens_per_step),
    )
    if stop.interrupted:
        raise Interrupted(result)
    return result


def _metrics(workdir: Path, start: int, primary: bool) -> MetricsWriter:
    """The metrics of a run that goes on from a step.

    Raises ConfigError where the file is damaged, and OSError where it cannot be written: ConfigError in every process
    where there are several.
    """
    try:
        metrics = MetricsWriter(workdir, resume_step=start if start else None, enabled=primary)
    except ValueError as error:
        advice = "mend or remove that line, or remove the file to go on without it"
        agreement.fail(ConfigError(f"{error}; {advice}"))
    except OSError as error:
        if jax.process_count() == 1:
            raise
        agreement.fail(error)
    agreement.agree({})
    return metrics


def _next(batches: Iterator[Window]) -> Window:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read on: {error}") from error


def _placed(batches: Iterable[Window], layout: Layout, watchdog: Watchdog) -> Iterator[Any]:
    for batch in batches:
        watchdog.beat()
        yield layout.batch(batch)


def _make_statistics(apply: Any, mixer: Any, layout: Layout) -> Any:
    """(parameters, window) -> {metric: number} of the preconditioners over its first tokens; {} without any."""
    if getattr(mixer, "preconditioner", "none") == "none":
        return lambda parameters, window: {}
    call = jax.jit(
        lambda parameters, tokens, ids: apply(parameters, tokens, ids, method="preconditioners"),
        out_shardings=layout.sharding(),
    )
    across: dict[str, Any] = {"mean": np.mean, "min": np.min, "max": np.max, "clipped": np.mean}

    def statistics(parameters: Any, window: Window) -> dict[str, float]:
        tokens, ids = (window[name][None, :_STATISTICS_TOKENS] for name in ("inputs", "segment_ids"))
        blocks = call(parameters, tokens, ids)
        return {f"preconditioner/{name}": float(across[name](np.asarray(x))) for name, x in blocks.items()}

    return statistics


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
    """Raises ValueError for a number out of range."""
    check_ranges(config)
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at: got {stop_at}, expected at least 1")


def _spread(source: WindowSource, count: int, batch_size: int, **share: int) -> ValidationBatches:
    """Batches of count windows spread evenly over a source; all of it if count is 0 or more than there are."""
    total = len(source)
    if not 0 < count < total:
        return validation_batches(source, batch_size=batch_size, **share)
    rows = [source[i * total // count] for i in range(count)]
    return validation_batches(rows, batch_size=batch_size, **share)
