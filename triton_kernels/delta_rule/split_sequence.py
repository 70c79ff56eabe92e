"""Split a long sequence of few heads into splits that run in parallel, to fill the GPU.

The states that the splits start from and end with are those of `initial_states` and `final_state_gradients` in
`pallas_kernels.common.delta_rule_inputs`.
"""

_ENOUGH = 144  # programs: as many as the largest GPU has multiprocessors that the settings know, the L40S with 142
_SHORTEST = 4  # chunks of a split
_FEWEST = 4  # splits: their work is about three times that of the unsplit sequence


def split_count(batch: int, heads: int, chunks: int, value_blocks: int) -> int:
    """Return the number of splits, a power of two that gives every multiprocessor a program if there are chunks enough.

    It is 1 if the heads nearly fill the GPU or the sequence is short.
    """
    count = 1
    while count * batch * heads * value_blocks < _ENOUGH and chunks >= 2 * count * _SHORTEST:
        count *= 2
    return count if count >= _FEWEST else 1
