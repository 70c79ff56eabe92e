"""The device that kernels are launched on."""

from typing import NamedTuple

from triton_kernels.common.cards import OLDEST, capability_of, device_in_use


class Target(NamedTuple):
    """The device or interpreter that kernels run on; hashable, so that it can be static under jit.

    Attributes:
        capability: compute capability times 10, such as 89: it selects the settings of a kernel.
        interpret: run in Triton's interpreter, on any machine.
    """

    capability: int
    interpret: bool = False


INTERPRETER = Target(OLDEST, interpret=True)


def target_in_use() -> Target:
    """Return the target for the devices in use.

    Raises:
        NotImplementedError: they are not NVIDIA GPUs of compute capability 8.0 or later.
    """
    reason = limitation()
    if reason is not None:
        raise NotImplementedError(reason)
    return Target(capability_of(device_in_use()) or 0)


def limitation() -> str | None:
    """Return why the devices in use cannot run the kernels, None if they can."""
    device = device_in_use()
    capability = capability_of(device)
    if capability is not None and capability >= OLDEST:
        return None
    has = "" if capability is None else f" of compute capability {capability / 10}"
    return f"got a {device.device_kind}{has}, the kernels need an NVIDIA GPU of compute capability 8.0 or later"
