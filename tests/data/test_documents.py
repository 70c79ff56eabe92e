"""Text read from disk."""

import gzip
import json
import lzma

import pytest

from osdn_jax.data import Document, read_documents

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", COMPRESS)
def test_txt_is_one_document(tmp_path, ending):
    file = tmp_path / f"a.TXT{ending}"
    file.write_bytes(COMPRESS[ending](b"\xef\xbb\xbfone\r\ntwo\rthree \xe2\x82\xac\n"))
    assert read_documents(file) == [Document(file.name, "one\ntwo\nthree €\n".encode())]
    assert read_documents(str(file)) == read_documents(file)


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl_has_one_document_per_row(tmp_path, ending):
    file = tmp_path / f"a.jsonl{ending}"
    rows = [json.dumps({"body": "x\r\ny \u2028 é"}), "", json.dumps({"body": ""}), json.dumps({"body": "z"})]
    file.write_bytes(COMPRESS[ending](b"\xef\xbb\xbf" + "\r\n".join(rows).encode()))
    name = file.name
    assert read_documents(file, field="body") == [
        Document(f"{name}:1", "x\ny \u2028 é".encode()),
        Document(f"{name}:4", b"z"),
    ]


def test_the_last_ending_determines_the_format(tmp_path):
    (tmp_path / "a.jsonl.txt").write_text("not JSON")
    assert read_documents(tmp_path) == [Document("a.jsonl.txt", b"not JSON")]


def test_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/rows.jsonl").write_text('{"text": "row"}')
    (tmp_path / "image.png").write_bytes(b"\0")
    (tmp_path / ".hidden").mkdir()
    for name in ("._b.txt", ".hidden/d.txt"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    names = [document.name for document in read_documents(tmp_path)]
    assert names == ["a/b/c.txt", "a/rows.jsonl:1", "a/z.txt", "b.txt", "c.txt"]


GZ, XZ = gzip.compress(b"text" * 100, mtime=0), lzma.compress(b"text" * 100)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text: the file is empty"),
        ("a.txt", b"\xef\xbb\xbf \n", "holds no text: nothing but blanks"),
        ("a.txt.gz", b"", "holds no text: the file is empty"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b'{"text": " "}', "holds no text"),
        ("a.txt", b"ab\0c", "NUL byte at byte offset 2"),
        ("a.txt", b"abc\xff", "byte 0xff at byte offset 3"),
        ("a.txt", b"abc\xe2\x82", "byte 0xe2 at byte offset 3"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.txt.xz", lzma.compress(b"abc\xff"), "byte 0xff at byte offset 3"),
        ("a.jsonl", b'{"text": "\xff"}', "byte 0xff at byte offset 10"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: malformed JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: malformed JSON"),
        ("a.jsonl", b'\n{"body": "a", "id": 1}', "line 2: no field 'text'; the row has 'body', 'id'"),
        ("a.jsonl", b"{}", "line 1: no field 'text'; the row has no fields"),
        ("a.jsonl", b'{"text": 3}', "line 1: field 'text' must be a string; got a number"),
        ("a.jsonl", b'{"text": null}', "line 1: field 'text' must be a string; got null"),
        ("a.jsonl", b'["text"]', "line 1: expected a JSON object with the field 'text'; got an array"),
        ("a.jsonl", rb'{"text": "a\u0000"}', "line 1: field 'text' is not text: NUL at character 1"),
        ("a.jsonl", rb'{"text": "a\ud800"}', "line 1: field 'text' has an unpaired surrogate at character 1"),
        ("a.txt.gz", GZ[:-12], "not a complete .gz file"),
        ("a.txt.gz", b"plain text", "not a complete .gz file"),
        ("a.txt.gz", GZ[:12] + b"\xff\xff" + GZ[14:], "not a complete .gz file"),
        ("a.txt.xz", XZ[:-12], "not a complete .xz file"),
        ("a.txt.xz", b"plain text", "not a complete .xz file"),
        ("a.jsonl.xz", XZ[:30] + b"\xff" + XZ[31:], "not a complete .xz file"),
        ("a.pdf", b"%PDF", r"unsupported file .*\.txt, \.jsonl, \.txt\.gz"),
    ],
)
def test_bad_file_is_named_with_the_place(tmp_path, name, data, message):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(file)
    assert str(file) in str(caught.value)


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent\.txt"):
        read_documents(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"holds no supported file; expected files ending in \.txt, \.jsonl"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="path must not be empty"):
        read_documents("")


def test_a_bad_file_in_a_folder_is_not_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b\.txt holds no text"):
        read_documents(tmp_path)


def test_arguments_of_the_wrong_type(tmp_path):
    with pytest.raises(TypeError, match="path must be a str or a path; got int"):
        read_documents(3)
    with pytest.raises(TypeError, match="field must be a str; got int"):
        read_documents(tmp_path, field=3)
