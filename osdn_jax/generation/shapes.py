"""Sizes that programs are compiled for: few, so that requests of other sizes compile nothing new."""

SHORTEST = 16  # tokens; a shorter piece that may be padded is padded to this length
PIECE = 2048  # tokens of a prompt that are read at a time, by default
ROWS = 16  # prompts at a time, by default
LONGEST_CACHE = 3 << 29  # tokens of the largest attention cache whose slots are numbered in 32 bits


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, itself at least 1."""
    return 1 << (number - 1).bit_length()


def padded_pieces(length: int, piece: int) -> list[int]:
    """Return the sizes of the pieces that `length` tokens are read in, if the first one may be padded at its start.

    The first is a power of two of at least 16, the others are `piece`.

    Example:
        >>> padded_pieces(70, 32), padded_pieces(64, 32)
        ([16, 32, 32], [32, 32])
    """
    whole, rest = divmod(length, piece)
    return [power_of_two(max(rest, SHORTEST))] * (rest > 0) + [piece] * whole


def exact_pieces(length: int, piece: int) -> list[int]:
    """Return the sizes of the pieces that `length` tokens are read in without padding: `piece`, then powers of two.

    Example:
        >>> exact_pieces(70, 32)
        [32, 32, 4, 2]
    """
    whole, rest = divmod(length, piece)
    return [piece] * whole + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def cache_length(tokens: int) -> int:
    """Return the size of an attention cache for this number of tokens: a power of two or 3/2 of one, at least 16.

    Example:
        >>> [cache_length(tokens) for tokens in (3, 17, 25, 100, 1500)]
        [16, 24, 32, 128, 1536]
    """
    size = power_of_two(max(tokens, SHORTEST))
    return size * 3 // 4 if tokens <= size * 3 // 4 and size > SHORTEST else size


def batches(lengths: dict[int, int], rows: int) -> list[list[int]]:
    """Return the indices of batches of at most `rows` prompts, the longest prompts first.

    Args:
        lengths: {index: number of tokens}.
        rows: prompts of a batch, at most.

    Example:
        >>> batches({0: 3, 1: 40, 2: 12}, 2)
        [[1, 2], [0]]
    """
    order = sorted(lengths, key=lambda index: -lengths[index])
    return [order[start : start + rows] for start in range(0, len(order), rows)]
