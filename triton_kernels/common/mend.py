"""Repairs of jax-triton 0.4.1; each does nothing where it is not needed.

- Under JAX 0.12 every jit around a kernel fails: JAX hands a rule for dead code three arguments, and that of jax-triton
  0.4.1 takes two. Under JAX 0.11, or with a jax-triton whose rule takes three, nothing is changed.
- Every version up to 0.4.1 hands XLA a kernel that asks for more shared memory than the GPU has, which fails at its
  first launch. The check is put around its compiler; without the function of that name nothing is changed.
"""

import functools
import inspect
from typing import Any

from triton_kernels.common.cards import shared_memory


@functools.cache
def mend() -> None:
    """Repair the installed jax-triton, once per process."""
    from jax_triton import triton_lib

    _mend_dead_code_rule(triton_lib)
    _check_shared_memory(triton_lib)


def _mend_dead_code_rule(triton_lib: Any) -> None:
    import jax

    rules, primitive = triton_lib.pe.dce_rules, triton_lib.triton_kernel_call_p
    if jax.__version_info__ < (0, 12) or len(inspect.signature(rules[primitive]).parameters) != 2:
        return

    def keep(used: Any, *context_and_equation: Any) -> Any:
        equation = context_and_equation[-1]
        return [True] * len(equation.invars), equation

    rules[primitive] = keep


def _check_shared_memory(triton_lib: Any) -> None:
    compile_kernel = getattr(triton_lib, "compile_ttir_inplace", None)
    if compile_kernel is None:
        return

    @functools.wraps(compile_kernel)
    def checked(ttir: Any, backend: Any, options: Any, gpu_target: Any) -> Any:
        result = compile_kernel(ttir, backend, options, gpu_target)
        check(result.name, result.shared_mem_bytes, gpu_target.arch)
        return result

    triton_lib.compile_ttir_inplace = checked


def check(name: str, shared: int, capability: Any) -> None:
    """Raise NotImplementedError if a kernel needs more shared memory than a block of the GPU may have.

    Args:
        name: of the kernel.
        shared: bytes.
        capability: compute capability times 10; anything else, as of GPUs that are not NVIDIA's, is not checked.
    """
    if isinstance(capability, int) and shared > shared_memory(capability):
        raise NotImplementedError(
            f"{name}: needs {shared:,} bytes of shared memory, a block on a GPU of compute capability "
            f"{capability / 10} may have {shared_memory(capability):,}"
        )
