"""Text from a trained model:  python -m osdn_jax.generate --workdir runs/osdn --prompt "ROMEO:" --tokens 300

Reads the newest checkpoint of the run and writes the prompt and what follows it to the terminal, piece by piece. Each
token costs the same time and memory, however long the text.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from osdn_jax.sampling import sample
from osdn_jax.training import CheckpointError, CheckpointMismatchError, load_trained
from osdn_jax.training.command_line import fail


def generate(
    workdir: str | Path,
    prompt: str = "",
    *,
    tokens: int = 300,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Yields pieces of text that go on from a prompt, by the newest checkpoint of a run.

    Takes the moving average of the parameters where the run has one.

    Raises:
        FileNotFoundError: workdir holds no run, or no checkpoint.
        CheckpointError: no checkpoint can be read.
        CheckpointMismatchError: it is of another model, or was trained with another tokenizer.
        ValueError: temperature, top_p or tokens out of range, or a prompt that the tokenizer cannot encode.
        ImportError: the library of the tokenizer is missing.
    """
    run = load_trained(workdir)
    tokenizer = run.tokenizer
    ids = tokenizer.encode(prompt, bos=True)
    drawn = sample(
        run.apply,
        run.parameters,
        ids,
        tokens=tokens,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        # The start of a document, and what a padded vocabulary has beyond the tokenizer's.
        forbidden=(tokenizer.bos_id, *range(tokenizer.vocab_size, run.model.vocab_size)),
    )

    def pieces() -> Iterator[str]:
        decoder = tokenizer.stream_decoder(ids)
        for token in drawn:
            yield decoder.push(token)
        yield decoder.finish()

    return pieces()


def main() -> None:
    """The command line."""
    parser = command.Parser(
        prog="python -m osdn_jax.generate", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of train.py")
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument("--tokens", type=int, default=300, help="how many to draw (default 300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="share of the distribution kept (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, 0 to 2^64 - 1 (default 0)")
    given = parser.parse_args()
    try:
        pieces = generate(
            command.directory("workdir", given.workdir),
            given.prompt,
            tokens=given.tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            seed=given.seed,
        )
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, CheckpointMismatchError) as error:
        fail(error)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a terminal that has not all characters
    with _line():
        _write(given.prompt)
        for piece in pieces:
            _write(piece)


@contextlib.contextmanager
def _line() -> Iterator[None]:
    """Ends the line of what is written, also where that is interrupted or fails."""
    try:
        yield
    except ValueError as error:
        _write("\n")
        fail(error)
    except KeyboardInterrupt:
        _write("\n")
        raise
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    command.run(main)
