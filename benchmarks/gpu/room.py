"""The number of processes of the suite that have room on a GPU at once."""

from osdn_jax import hardware

# Bytes; estimates, generous for the cases and shapes of the suite.
_CHECKING = 3e9  # a process that checks a case: its CUDA context, the reference's states and their gradients
_WAITING = 0.6e9  # a process that has compiled and waits for its turn: its CUDA context
_ALONE = 10e9  # a process that is timed


def together(device: str, cores: int) -> int:
    """Return the number of processes to run at once: one per core, and no more than the GPU's memory holds.

    Args:
        device: name of the GPU; of an unknown one, the memory is not counted.
        cores: of this machine.
    """
    gpu = hardware.gpu_of(device)
    return cores if gpu is None else max(1, min(cores, int(gpu.memory // _CHECKING)))


def waiting(device: str) -> int | None:
    """Return the number of processes that may wait while another is timed; None if there is no limit.

    Args:
        device: name of the GPU.
    """
    gpu = hardware.gpu_of(device)
    return None if gpu is None else max(1, int((gpu.memory - _ALONE) // _WAITING))
