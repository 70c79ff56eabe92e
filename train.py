"""Train a model:  python train.py --config=configs/demo.py --workdir=runs/osdn

The same command resumes the run if it was stopped. Arguments of the configuration file come after a colon, and any key
of the configuration can be set (osdn_jax/training/config.py lists them with their defaults):

    python train.py --config=configs/demo.py:rule=delta_net,seed=1 --config.optimizer.beta2=0.99 --workdir=runs/mine

To see what a run needs before there are GPUs, compile its step for 8 hosts of 8 GPUs; this trains nothing:

    python train.py --config=configs/lm_1b.py:rule=osdn --plan=8x8 --gpu=h200
"""

from collections.abc import Sequence

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from absl import flags, logging
from ml_collections import config_flags

from osdn_jax._files import write_atomically
from osdn_jax.hardware import GPUS
from osdn_jax.progress import say
from osdn_jax.training import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    DivergedError,
    Interrupted,
    agreement,
    check_ranges,
    distributed,
    train,
)
from osdn_jax.training.command_line import run
from osdn_jax.training.profiling import parse_range
from osdn_jax.training.workdir import checked_workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file: configs/NAME.py[:key=value,...].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, for checkpoints, metrics and plots.")
_PROFILE = flags.DEFINE_string("profile", None, "Write a trace of the steps FIRST:LAST to WORKDIR/profile.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Address host:port of process 0, if there are several.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process (0-based).")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Total number of processes.")
_STOP_AT = flags.DEFINE_integer("stop_at", None, "Stop after this step and save a checkpoint.", lower_bound=1)
_START_FROM = flags.DEFINE_string(
    "start_from", None, "Start a new run from the parameters of the run in this directory (to fine-tune, or train on)."
)
_PLAN = flags.DEFINE_string("plan", None, "Train nothing; report what the run needs on these devices: HOSTSxGPUS.")
_GPU = flags.DEFINE_string("gpu", None, f"GPU type to plan for: {', '.join(sorted(GPUS))}.")
_PLAN_JSON = flags.DEFINE_string("plan_json", None, "Write the plan's figures to this file.")


def main(_: list[str]) -> int | None:
    """Run the training that the command line describes; return the exit status."""
    logging.set_verbosity(logging.WARNING)  # JAX reports accelerators that it did not find
    if _PLAN.value is not None:
        _plan()
        return 0
    for flag in (_GPU, _PLAN_JSON):
        if flag.value is not None:
            raise ConfigError(f"--{flag.name}: got {flag.value!r} without a plan, expected --plan=HOSTSxGPUS too")
    if _WORKDIR.value is None:
        raise ConfigError("give the run a directory: --workdir=runs/NAME")
    workdir, status = checked_workdir(_WORKDIR.value), 0
    try:
        distributed.start(_COORDINATOR.value, _PROCESS_ID.value, _PROCESS_COUNT.value)
        profile = None if _PROFILE.value is None else parse_range(_PROFILE.value)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    try:
        result = train(_CONFIG.value, workdir, stop_at=_STOP_AT.value, start_from=_START_FROM.value, profile=profile)
    except Interrupted as interrupted:
        result, status = interrupted.result, command.INTERRUPTED
    if not distributed.is_primary():
        return status
    if result.bits_per_byte is None:
        say(f"stopped after step {result.step:,}; the same command goes on from there")
    else:
        unit = (
            "byte on the held-out text" if _CONFIG.value.data.get("task") is None else "answer of the held-out examples"
        )
        say(f"{result.bits_per_byte:.4f} bits per {unit}; see {workdir}/loss.png")
    return status


def _plan() -> None:
    from osdn_jax import planning

    try:
        check_ranges(_CONFIG.value)
        file = None if _PLAN_JSON.value is None else command.output_file("plan_json", _PLAN_JSON.value, replaced=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def print_plan() -> None:
        plan = planning.plan(_CONFIG.value, _PLAN.value, _GPU.value)
        if file is not None:
            write_atomically(file, planning.as_json(plan))
        print(planning.report(plan))

    command.run(print_plan)


def _tell(error: Exception, arguments: Sequence[str]) -> Exception:
    """Call `agreement.tell`, except for a plan, in which no other process takes part."""
    planned = any(argument.lstrip("-").startswith("plan") for argument in arguments[1:])
    return error if planned else agreement.tell(error, arguments)


if __name__ == "__main__":
    run(
        main,
        errors=(ConfigError, DataError, DivergedError, CheckpointError, CheckpointMismatchError, OSError),
        tell=_tell,
    )
