"""Split a long sequence of few heads into splits that run in parallel, to fill the GPU.

The states that the splits start from and end with are those of `initial_states` and `final_state_gradients` in
`pallas_kernels.common.delta_rule_inputs`.
"""

from pallas_kernels.delta_rule.chunk_loop import tile_width

_MULTIPROCESSORS = 132
_SHORTEST = 16  # chunks of a split
_FEWEST = 4  # splits: their work is about three times that of the unsplit sequence


def split_count(batch: int, heads: int, chunks: int, key_dim: int, value_dim: int) -> int:
    """Return the number of splits, a power of two whose blocks fit in one wave.

    It is 1 if the heads fill the GPU or the sequence is short.
    """
    blocks = batch * heads * value_dim // tile_width(key_dim)
    count = 1
    while 2 * count * blocks <= _MULTIPROCESSORS and chunks >= 2 * count * _SHORTEST:
        count *= 2
    return count if count >= _FEWEST else 1
