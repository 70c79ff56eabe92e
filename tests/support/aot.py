"""Output of the assembler, and outcomes made of it, for the tests of `python -m pallas_kernels.aot`."""

from pallas_kernels.aot.assembler import Kernel
from pallas_kernels.aot.compiler import Outcome

BOUNDS = "Potential out of bound access while accessing symbol '__dynamic_shmem__0' of type '.b8'."
SERIAL = "(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'b'"
# The format of jaxlib 0.11, and below that of 0.12. The host code in between is cut down to what is parsed.
PTXAS = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'delta_rule_recur_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for delta_rule_recur_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 222 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 89.420 ms

declare i32 @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr, ptr)
  %726 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 1, i32 2, i32 2, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, \
i32 183312, i32 0, ptr %1, ptr %719)
ptxas tempfile-1, line 505; info    : {BOUNDS}
ptxas warning : Registers are spilled to local memory in function 'b', 236 bytes spill stores, 244 bytes spill loads
ptxas info    : Compiling entry function 'delta_rule_recur_back_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for delta_rule_recur_back_mosaic_gpu_kernel
    240 bytes stack frame, 236 bytes spill stores, 244 bytes spill loads
ptxas info    : {SERIAL}
ptxas info    : Used 255 registers, used 2 barriers, 240 bytes cumulative stack size, 1 bytes smem
"""
NVJITLINK = f"""
ptxas application ptx input, line 536; info    : {BOUNDS}
ptxas warning : Registers are spilled to local memory in function 'a', 260 bytes spill stores, 260 bytes spill loads
ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for a_mosaic_gpu_kernel
ptxas         .     264 bytes stack frame, 260 bytes spill stores, 260 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 17 bytes smem
info    : Function properties for 'a_mosaic_gpu_kernel':
info    : used 255 registers, used 2 barriers, 264 stack, 1025 bytes smem, 2112 bytes cmem[0], 0 bytes lmem
 \0
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 1, i32 2, i32 8, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, \
i32 126984, i32 0, i32 1, ptr %1077, ptr %1079)
"""
NAME = "delta_rule/gradient/scalar/K128V128/bfloat16"


def kernel_call(name, identity):
    """Return the line of compiled HLO that calls a kernel; identity is the hash of its code."""
    return (
        f'%x = bf16[2] custom-call(%y), custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/jvp()/{name}/'
        f'mpmd_map" stack_frame_id=2}}, backend_config={{kernel_hash = "{identity}", module = "ML\\EF"}}\n'
    )


def outcome_of(*spills, status="compiled", message=""):
    """Return the outcome of the case NAME with a kernel "a" for each number of spilled bytes."""
    kernels = [Kernel("a", registers=9, spill_stores=spill, block=(128, 1, 1), shared_memory=1024) for spill in spills]
    return Outcome(NAME, status, kernels=kernels, message=message)
