"""The assembler's output as `pallas_kernels.aot` parses it: kernels, launches, occupancy, remarks."""

import pytest

from pallas_kernels.aot import occupancy
from pallas_kernels.aot.assembler import Kernel, of_program, parse
from pallas_kernels.aot.compiler import Outcome
from pallas_kernels.aot.record import Record
from support.aot import BOUNDS, NAME, NVJITLINK, PTXAS, SERIAL, kernel_call


def test_the_assembler_of_the_path_is_read():
    recur, back = parse(PTXAS)
    launch = {"grid": (1, 2, 2), "block": (128, 1, 1), "shared_memory": 183312}
    assert recur == Kernel("delta_rule_recur", registers=222, barriers=2, **launch)
    assert recur.threads == 128
    assert back == Kernel(
        "delta_rule_recur_back",
        registers=255,
        stack=240,
        spill_stores=236,
        spill_loads=244,
        barriers=2,
        remarks=[BOUNDS, SERIAL],
    )
    assert back.spill == 244
    assert (recur.blocks, back.blocks) == (1, None)  # no launch of the second was printed


def test_the_assembler_in_jaxlib_is_read():
    (kernel,) = parse(NVJITLINK)
    launch = {"grid": (1, 2, 8), "block": (128, 1, 1), "shared_memory": 126984}
    assert kernel == Kernel("a", 255, 264, 260, 260, barriers=2, **launch, remarks=[BOUNDS])
    assert kernel.threads == 128


def test_a_remark_belongs_to_the_next_kernel_once_one_is_launched():
    first, second = parse(NVJITLINK + f"ptxas info : {SERIAL}" + NVJITLINK.replace("'a_", "'b_"))
    assert (first.remarks, second.remarks) == ([BOUNDS], [SERIAL, BOUNDS])


def test_nothing_is_read_from_nothing():
    assert parse("Used 3 registers\nwarning: nothing\n") == []


@pytest.mark.parametrize(
    ("registers", "threads", "shared_memory", "expected"),
    [
        (255, 128, 66576, 2),  # registers are the limit
        (168, 128, 0, 3),
        (169, 128, 0, 2),  # allocated in units of 8
        (200, 32, 0, 8),  # enough for ten warps, but only two in each of four partitions
        (64, 128, 77832, 2),  # shared memory is the limit
        (64, 128, 115712, 2),
        (64, 128, 115713, 1),
        (64, 128, 232448, 1),
        (64, 128, 232449, 0),  # more than a block can have
        (32, 1024, 0, 2),  # the limit of warps
        (32, 65, 0, 21),
        (32, 32, 0, 32),  # the limit of blocks
        (255, 1024, 0, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers, threads, shared_memory, expected):
    assert occupancy.blocks(registers, threads, shared_memory) == expected
    kernel = Kernel("a", registers=registers, block=(threads, 1, 1), shared_memory=shared_memory)
    assert kernel.blocks == expected


@pytest.mark.parametrize(
    ("grid", "block", "refusals"),
    [
        ((2**31 - 1, 65535, 65535), (1024, 1, 1), []),
        ((2**31, 1, 1), (128, 1, 1), ["a has 2,147,483,648 blocks along x, a launch takes at most 2,147,483,647"]),
        ((1, 65536, 1), (128, 1, 1), ["a has 65,536 blocks along y, a launch takes at most 65,535"]),
        (
            (1, 1, 65536),
            (128, 1, 65),
            [
                "a has 65,536 blocks along z, a launch takes at most 65,535",
                "a has 65 threads along z, a launch takes at most 64",
            ],
        ),
        (None, None, []),
    ],
)
def test_a_launch_beyond_the_limits_is_wrong(grid, block, refusals):
    kernel = Kernel("a", grid=grid, block=block)
    assert kernel.refusals == refusals
    assert Record().problems(Outcome(NAME, "compiled", kernels=[kernel])) == refusals


def test_kernels_are_found_by_their_code():
    forward, again, other = Kernel("prepare", 1), Kernel("prepare", 2), Kernel("walk", 3)
    known = {}
    text = (
        kernel_call("prepare", r"\22\\")
        + kernel_call("walk", "w")
        + kernel_call("prepare", "p")
        + kernel_call("walk", "w")
    )
    assert of_program(text, [other, forward, again], known) == [forward, other, again]
    # A kernel that was compiled before is not printed again.
    assert of_program(kernel_call("prepare", "p") + kernel_call("new", "n"), [Kernel("new")], known) == [
        again,
        Kernel("new"),
    ]
    with pytest.raises(LookupError, match="no kernel in the program"):
        of_program('custom_call_target="other"', [], known)
    with pytest.raises(LookupError, match="printed nothing of walk"):
        of_program(kernel_call("walk", "new"), [forward], known)


def test_a_kernel_of_several_gpus_is_found_by_the_name_in_its_code():
    call = kernel_call("jit(f)", "hash").replace(
        r'"ML\EF"', r'"ML\EF\00stable_mosaic_gpu\00\22\00delta_rule_recur_mosaic_gpu\00"'
    )
    recur = Kernel("delta_rule_recur", 1)
    assert of_program(call, [Kernel("gram", 2), recur], {}) == [recur]
