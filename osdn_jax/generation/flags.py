"""The flags of `python -m osdn_jax.generate`; a value out of range is an error that names its flag."""

import argparse
from collections.abc import Callable
from typing import Any

from osdn_jax import command
from osdn_jax.generation import arguments


def parser(description: str) -> command.Parser:
    """Return the parser of the command line.

    Args:
        description: what --help says of the command.
    """
    found = command.Parser(prog="python -m osdn_jax.generate", description=description, allow_abbrev=False)
    _add_model(found)
    _add_prompts(found)
    _add_options(found)
    _add_states(found)
    return found


def check(given: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    prompts = max(len(found or []) for found in (given.prompt, given.prompts, given.prompt_ids))
    if given.save_state is not None and prompts > 1:
        raise ValueError(f"--save_state: got {prompts} prompts, expected one")
    if given.keep_every is not None and (given.save_state is None or given.load_state is not None):
        raise ValueError("--keep_every: expected it with --save_state and without --load_state")
    if given.at is not None and given.load_state is None:
        raise ValueError("--at: expected it with --load_state")
    if given.ignore_remote_code and given.model is None:
        raise ValueError("--ignore_remote_code: expected it with --model")
    if given.stop and given.prompt_ids is not None:
        raise ValueError("--stop: got a text with --prompt_ids, expected text prompts, or --stop_tokens")


def name_flags(error: Exception, given: argparse.Namespace) -> str:
    """Return an error's message with flags in place of the arguments of Python functions."""
    kinds = {"prompt": given.prompt, "prompts": given.prompts, "prompt_ids": given.prompt_ids}
    prompts = next((flag for flag, value in kinds.items() if value is not None), "prompt")
    names = {
        "prompts": f"--{prompts}",
        "token": "--at",
        "state": "--load_state",
        "path": "--model",
        "max_tokens": "--tokens",
    }
    names |= {name: f"--{name}" for name in ("stop_tokens", "ignore_remote_code")}
    return command.naming_flags(str(error), names)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="working directory of a run of train.py")
    model.add_argument("--model", help="folder with config.json and safetensors files, as Transformers saves them")
    parser.add_argument(
        "--ignore_remote_code",
        action="store_true",
        help="load a folder whose config.json names Python code, without running that code",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        action="append",
        help="text to continue; several make a batch (default: the start of a document, if the tokenizer has one)",
    )
    prompts.add_argument("--prompts", type=_lines, metavar="FILE", help="file with one prompt in each line")
    prompts.add_argument(
        "--prompt_ids", action="append", type=_ids, help="tokens to continue, such as 1,2,3; tokens are written"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokens",
        type=_checked(int, arguments.max_tokens),
        default=300,
        help="number of tokens to generate, at most (default 300)",
    )
    add(
        "--temperature",
        type=_checked(float, arguments.temperature),
        default=0.8,
        help="lower is less random; 0 takes the most likely token (default 0.8)",
    )
    add(
        "--top_k",
        type=_checked(int, arguments.top_k),
        default=0,
        help="sample from this number of the most likely tokens (default: all)",
    )
    add(
        "--top_p",
        type=_checked(float, arguments.top_p),
        default=0.95,
        help="sample from the most likely tokens whose probabilities sum to this, in (0, 1] (default 0.95)",
    )
    add(
        "--min_p",
        type=_checked(float, arguments.min_p),
        default=0.0,
        help="leave out tokens less likely than this times the most likely one (default 0)",
    )
    add(
        "--repetition_penalty",
        type=_checked(float, arguments.repetition_penalty),
        default=1.0,
        help="more than 1 makes tokens of the prompt and the text less likely (default 1)",
    )
    add("--stop", action="append", default=[], help="text that ends a continuation; may be repeated")
    add(
        "--stop_tokens",
        type=_ids,
        help="tokens that end a continuation, such as 1,2, or '' for none (default: those that end a text of --model)",
    )
    add(
        "--seed",
        type=_checked(int, arguments.seed),
        default=0,
        help="random seed of the first prompt, 0 to 2^64 - 1 (default 0)",
    )


def _add_states(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--state_dtype", choices=("float32", "bfloat16"), help="dtype of the states (default: that of the model)")
    add("--save_state", metavar="FILE", help="file for the state after a prompt and its continuation")
    add(
        "--keep_every",
        type=_checked(int, lambda value: arguments.at_least_one("keep_every", value)),
        help="with --save_state: save the prompt alone, with a state after every this number of tokens",
    )
    add("--load_state", metavar="FILE", help="file of --save_state, which the prompts follow")
    add("--at", type=int, help="with --load_state of --keep_every: start after this number of tokens")


def _checked(kind: type[int | float], check: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Return the type of a flag whose values an argument's check accepts."""

    def convert(text: str) -> Any:
        value = kind(text)
        try:
            return check(value)
        except ValueError as error:  # "argument: got …", of which argparse puts the flag in front
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error

    convert.__name__ = kind.__name__  # argparse names it where `kind` refuses the text
    return convert


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers separated by commas") from None


def _lines(name: str) -> list[str]:
    """Return the lines of a file of prompts."""
    try:
        text = command.input_file("prompts", name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"got {name!r}, which is not UTF-8 at byte {error.start}, expected a file of text"
        ) from error
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--prompts: ")) from error
    if not text:
        raise argparse.ArgumentTypeError(f"got the empty file {name!r}, expected one prompt in each line")
    return text.removesuffix("\n").split("\n")  # str.splitlines also splits at characters inside a line
