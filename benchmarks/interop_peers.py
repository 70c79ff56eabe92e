"""Compare models, loaded and saved, with other libraries:  python -m benchmarks.interop_peers --peer other/bin/python

The other library, in a separate environment, writes tiny random checkpoints of every family with the logits that it
computes. Here each is loaded, run, saved and loaded again; then the other library loads the folders saved here and
computes the logits once more. It writes benchmarks/results/interop-transformers.md and .json and prints the former.
The exit status is 1 if logits differ by more than 1e-5, or if a saved folder differs from the one that was loaded.
benchmarks/interop/README.md says how to make the environment. It takes about half an hour, much of it for the Triton
kernels of flash-linear-attention, which run in an interpreter.
"""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interop.cases import CASES, REFUSABLE
from benchmarks.ops.record import write
from osdn_jax import command, interop, nn
from osdn_jax.compare import environment

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-5  # of the largest difference of two logits
GRADIENT_TOLERANCE = 1e-4  # of the largest difference in a gradient, relative to the largest element of the gradient
NEW, NEW_TOKENS = "-new", 20


@dataclasses.dataclass
class Row:
    """Results of one checkpoint; differences are the largest of all logits, and None if they were not computed."""

    name: str
    loaded: float | None = None  # ours and theirs, 70 tokens
    lengths: float | None = None  # 1, and 100 or 200 tokens
    padded: float | None = None  # padded on the left
    gradients: float | None = None  # of all parameters, relative
    again: float | None = None  # ours before saving and after loading again
    returned: float | None = None  # theirs from our folder, and ours
    original: float | None = None  # theirs from our folder, and theirs from the original
    new: float | None = None  # theirs from a folder that we wrote without the original config.json, and theirs
    left_out: int = 0  # tensors of other parts of the model, which are neither loaded nor saved
    files: str = ""  # what differs between the two folders
    error: str = ""

    def failed(self) -> bool:
        """Return whether anything is beyond the tolerance."""
        pairs = (self.loaded, self.lengths, self.padded, self.returned, self.original, self.new)
        wrong = any(x is not None and not x <= TOLERANCE for x in pairs)
        wrong |= self.gradients is not None and not self.gradients <= GRADIENT_TOLERANCE
        return bool(wrong or self.error or self.files or self.again)


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return {name: (type, shape, bytes)} of all tensors of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + first : start + last])
    return found


def folder_differences(original: Path, saved: Path) -> str:
    """Return what differs between the tensors and configurations of two folders, "" if nothing does."""
    a, b = tensors(original), tensors(saved)
    lines = []
    for what, names in (
        ("missing", [name for name in a if name not in b]),
        ("new", [name for name in b if name not in a]),
        ("other shape or type", [name for name in a if name in b and a[name][:2] != b[name][:2]]),
        ("other values", [name for name in a if name in b and a[name][:2] == b[name][:2] and a[name] != b[name]]),
    ):
        if names:
            lines.append(f"{len(names)} tensors {what}, as {names[0]}")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (original, saved)]
    changed = sorted(name for name in {*configs[0], *configs[1]} if configs[0].get(name) != configs[1].get(name))
    if changed:
        lines.append(f"config.json: {', '.join(changed)}")
    return "; ".join(lines)


def compare(row: Row, folder: Path, work: Path) -> None:
    """Load one checkpoint, compare its logits with the expected ones, and save it for the other library."""
    expected = np.load(folder / "expected.npz")
    model = interop.load_pretrained(folder, dtype="float32")
    ours = np.asarray(interop.logits(model, expected["input_ids"]))
    row.loaded = _difference(ours, expected["logits"])
    if (folder / "more.npz").exists():
        more = np.load(folder / "more.npz")
        row.lengths = max(
            _difference(interop.logits(model, more[f"input_ids_{n}"]), more[f"logits_{n}"]) for n in ("1", "long")
        )
        mask = more["mask_padded"]
        apply, parameters = nn.split_model(model)
        ids, segments = (more[name].astype(np.int32) for name in ("input_ids_padded", "mask_padded"))
        padded, _ = jax.jit(apply)(parameters, ids, segment_ids=segments)
        row.padded = _difference(np.asarray(padded)[mask == 1], more["logits_padded"][mask == 1])
    if (folder / "gradients").is_dir():
        row.gradients = gradient_difference(model, folder / "gradients")
    stored = interop.load_pretrained(folder)  # in the types of the file, which the saved file has to have too
    family, row.left_out = stored.origin.family, len(stored.origin.left_out)
    saved, new = (work / (row.name.replace("/", "-") + end) for end in ("", NEW))
    shards = list(folder.glob("model-*.safetensors"))
    size = max(shard.stat().st_size for shard in shards) if shards else 2**30
    interop.save_pretrained(stored, saved, max_shard_bytes=size, layout=family if row.left_out else None)
    row.files = "" if row.left_out else folder_differences(folder, saved)
    again = interop.load_pretrained(saved, dtype="float32")
    row.again = _difference(interop.logits(again, expected["input_ids"]), ours)
    np.savez(saved / "inputs.npz", input_ids=expected["input_ids"])
    np.savez(saved / "ours.npz", logits=ours)
    stored.origin = None
    interop.save_pretrained(stored, new, layout=family)
    np.savez(new / "inputs.npz", input_ids=expected["input_ids"][:1, :NEW_TOKENS])


def gradient_difference(model: nn.CausalLM, folder: Path) -> float:
    """Return the largest difference from gradients that the other library saved as a checkpoint.

    It is relative to the largest element of a parameter's gradient, or to a thousandth of the largest of all: some
    gradients are zero but for rounding, as that of a router that chooses one expert and normalises its weight.
    """
    given = np.load(folder / "weights.npz")
    apply, parameters = nn.split_model(model)
    tokens = jnp.asarray(given["input_ids"], jnp.int32)

    @jax.jit
    @jax.grad
    def gradients(parameters: dict[str, jax.Array]) -> jax.Array:
        logits, _ = apply(parameters, tokens)
        return (logits * given["weights"]).sum()

    found = gradients(parameters)
    _, wanted = nn.split_model(interop.load_pretrained(folder, dtype="float32"))
    largest = {name: float(np.abs(value).max()) for name, value in wanted.items()}
    floor = 1e-3 * max(largest.values())
    return max(_difference(found[name], wanted[name]) / max(size, floor) for name, size in largest.items())


def returned(row: Row, folder: Path, work: Path) -> None:
    """Compare the logits that the other library computed from the folder saved here."""
    saved, new = (work / (row.name.replace("/", "-") + end) for end in ("", NEW))
    expected = np.load(folder / "expected.npz")["logits"]
    for place in (saved, new):
        if (place / "theirs.txt").exists():
            row.error = (place / "theirs.txt").read_text()
    if (saved / "theirs.npz").exists():
        theirs = np.load(saved / "theirs.npz")["logits"]
        row.returned = _difference(theirs, np.load(saved / "ours.npz")["logits"])
        row.original = _difference(theirs, expected)
    if (new / "theirs.npz").exists():
        row.new = _difference(np.load(new / "theirs.npz")["logits"], expected[:1, :NEW_TOKENS])


def _difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def run_peer(peer: str, module: str, *arguments: str) -> str:
    """Run a module of benchmarks.interop with the other Python; return the last line that it prints."""
    done = subprocess.run(
        [peer, "-W", "ignore", "-m", f"benchmarks.interop.{module}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return (done.stdout.strip().splitlines() or [""])[-1]


def markdown(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    about, versions = record["environment"], record["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "# Models of other libraries, loaded and saved"
    yield ""
    yield "By `python -m benchmarks.interop_peers`; [its README](../interop/README.md) says what runs where. Each"
    yield "checkpoint is a tiny random model as the other library saves it. The numbers are the largest absolute"
    yield f"differences of the logits in float32, whose standard deviation is about 0.35; the limit is {TOLERANCE:.0e}."
    yield ""
    yield "- load: ours from their folder, and theirs; 70 tokens, two rows"
    yield "- lengths: the same with 1 token, and with 200 (flash-linear-attention: 100)"
    yield "- padding: the same for a batch that is padded on the left"
    yield "- gradients: of all parameters for a weighted sum of the logits, ours and theirs, relative to the largest"
    yield f"  element of each parameter's gradient; the limit is {GRADIENT_TOLERANCE:.0e}"
    yield "- return: theirs from the folder that we saved, and ours"
    yield "- both ways: theirs from the folder that we saved, and theirs from the original"
    yield f"- new: theirs from a folder that we wrote without the original config.json, and theirs; {NEW_TOKENS} tokens"
    if any(row["name"].startswith("more/") for row in record["rows"]):
        yield "- more/…: checkpoints that were not made by this command"
    yield "- folder: whether the folder that we saved has the same tensors, bit by bit, and the same configuration"
    yield ""
    yield f"{about['date']}, {about['cpu']}, {about['cpu_cores']} cores; {names}; jax {about['jax']}, Python"
    yield f"{about['python']}: `{about['command']}`."
    yield ""
    yield "| checkpoint | load | lengths | padding | gradients | return | both ways | new | folder |"
    yield "| --- " + "| ---: " * 7 + "| --- |"
    columns = ("loaded", "lengths", "padded", "gradients", "returned", "original", "new")
    for row in record["rows"]:
        limits = (GRADIENT_TOLERANCE if column == "gradients" else TOLERANCE for column in columns)
        cells = " | ".join(_number(row[column], limit) for column, limit in zip(columns, limits, strict=True))
        yield f"| {row['name']} | {cells} | {_folder(row)} |"
    if record["refused"]:
        yield from ("", "Options that the other library runs and that `load_pretrained` refuses:", "")
        yield from ("| checkpoint | error |", "| --- | --- |")
        for name, text in record["refused"].items():
            yield f"| {name} | {text} |"


def _folder(row: Mapping[str, Any]) -> str:
    if row["left_out"]:
        return row["error"] or f"without {row['left_out']} tensors of other parts"
    return row["error"] or row["files"] or "the same"


def _number(value: float | None, limit: float) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if value <= limit else f"**{value:.1e}**"


def first_line(error: Exception) -> str:
    """Return the first line of an error without the folder's path."""
    text = str(error).splitlines()[0]
    return text.partition("config.json: ")[2] or f"{type(error).__name__}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.Parser(
        prog="python -m benchmarks.interop_peers", description=(__doc__ or "").split(":  ")[0] + "."
    )
    parser.add_argument("--peer", metavar="PYTHON", help="Python with the other libraries (default: not run)")
    parser.add_argument(
        "--checkpoints", metavar="FOLDER", type=Path, help="checkpoints made before (default: they are made first)"
    )
    parser.add_argument("--more", metavar="FOLDER", type=Path, help="further checkpoints, each with expected.npz")
    parser.add_argument("--only", default="", help="those whose names start with this")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    given = parser.parse_args(argv)
    if given.peer is None and given.checkpoints is None and given.more is None:
        parser.error("--peer: expected the Python of an environment with the other libraries")
    peer = None if given.peer is None else shutil.which(given.peer)
    if given.peer is not None and peer is None:
        parser.error(f"--peer: got {given.peer}, expected a Python")
    peer = None if peer is None else str(Path(peer).absolute())  # it runs in the repository's folder
    with tempfile.TemporaryDirectory() as temporary, jax.default_matmul_precision("highest"):
        work = Path(temporary) / "saved"
        work.mkdir()
        made = given.checkpoints
        if made is None and peer is not None:
            made = Path(temporary)
            run_peer(peer, "make", str(made), *(n for n in {**CASES, **REFUSABLE} if n.startswith(given.only)))
        folders = {n: made / n for n in {**CASES, **REFUSABLE} if made is not None and (made / n).is_dir()}
        if given.more is not None:
            folders |= {f"more/{f.parent.name}": f.parent for f in sorted(given.more.glob("*/expected.npz"))}
        folders = {name: folder for name, folder in folders.items() if name.startswith(given.only)}
        record = _record(folders, work, peer, shlex.join(["python", "-m", "benchmarks.interop_peers", *argv]))
    page = list(markdown(record))
    print("\n".join(page))
    write(given.out or RESULTS, "interop-transformers", record, page)
    return int(any(row["failed"] for row in record["rows"]))


def _record(folders: Mapping[str, Path], work: Path, peer: str | None, line: str) -> dict[str, Any]:
    rows, refused = [], {}
    for name, folder in folders.items():
        row = Row(name)
        try:
            compare(row, folder, work)
        except (OSError, TypeError, ValueError, NotImplementedError) as error:
            if name in REFUSABLE:
                refused[name] = first_line(error)
                continue
            row.error = first_line(error)
        print(f"{name}: {row}", file=sys.stderr, flush=True)
        rows.append((row, folder))
    versions = {} if peer is None else json.loads(run_peer(peer, "read", str(work)))
    for row, folder in rows:
        returned(row, folder, work)
    return {
        "environment": environment(line),
        "versions": versions,
        "refused": refused,
        "rows": [{**dataclasses.asdict(row), "failed": row.failed()} for row, _ in rows],
    }


if __name__ == "__main__":
    command.run(main)
