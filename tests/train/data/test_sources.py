import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cp_gdn.train.data import sources
from cp_gdn.train.data.sources import Document, list_files, read_documents

TEXTS = ["one", "zwei\nlines", "", "trois é", "four"]
LINES = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(folder: Path, text_key: str = "text") -> list[Document]:
    files = list_files("text", str(folder))
    return [document for file in files for document in read_documents(file, text_key)]


def write_parquet(path: Path, column: str = "text", texts: list[str | None] = TEXTS) -> None:
    pq.write_table(pa.table({"n": list(range(len(texts))), column: texts}), path)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_record_is_a_document(tmp_path, form):
    path = tmp_path / f"data.{form}"
    if form == "parquet":
        write_parquet(path)
    elif form == "jsonl":
        path.write_bytes(LINES + b"\n  \n")  # blank lines are no records
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(LINES))
    else:  # two frames, as parallel compressors write them
        half = LINES.index(b"\n") + 5
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(LINES[:half]) + compress(LINES[half:]))
    found = read(tmp_path)
    assert [d.text.decode() for d in found] == [t for t in TEXTS if t]
    assert found[1].where == f"data.{form} {'row' if form == 'parquet' else 'line'} 2"
    assert found[-1].position == path.stat().st_size


@pytest.mark.parametrize("form", ["txt", "txt.gz", "txt.zst"])
def test_a_text_file_is_one_document_of_any_bytes(tmp_path, form):
    text = b"a\n\nb\xff\xfe" * 1000
    compress = {
        "txt": bytes,
        "txt.gz": gzip.compress,
        "txt.zst": zstandard.ZstdCompressor().compress,
    }[form]
    (tmp_path / f"a.{form}").write_bytes(compress(text))
    assert [d.text for d in read(tmp_path)] == [text]


def test_a_large_zstd_file_is_read_whole(tmp_path):
    text = bytes(range(256)) * 20_000  # many blocks, several reads
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
    assert [d.text for d in read(tmp_path)] == [text]


def test_files_are_sorted_by_name_and_hidden_or_foreign_ones_skipped(tmp_path):
    for name in ["b/2.txt", "a.jsonl", "b/1.txt", ".hidden.txt", ".git/x.txt", "b/c.md", "z.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert [f.name for f in list_files("text", str(tmp_path))] == ["a.jsonl", "b/1.txt", "b/2.txt"]
    (alone,) = list_files("text", str(tmp_path / "b" / "1.txt"))
    assert alone.name == "1.txt"


def test_the_standard_library_is_there_without_tests_and_third_parties():
    names = [f.name for f in list_files("stdlib", None)]
    assert "json/decoder.py" in names and len(names) > 200
    assert names == sorted(names)
    assert not [n for n in names if "site-packages" in n or n.startswith(("test/", "idlelib/"))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json\n", ["line 2 is not JSON", "repair"]),
        (b'{"body": "x", "a": 1}\n', ["line 2 has the fields ['a', 'body']", "text_key"]),
        (b'["x"]\n', ["line 2 is no object", "text_key"]),
        (b'{"text": null}\n', ["line 2 has NoneType", "a document is a string"]),
        (b'{"text": "\\ud800"}\n', ["line 2 is not valid Unicode", "repair"]),
        (b'{"text": "\xff"}\n', ["line 2 is not JSON", "repair"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_parquet_file_needs_the_column_with_text_in_every_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", column="body")
    assert len(read(tmp_path, text_key="body")) == 4
    with pytest.raises(ValueError, match=r"columns \['n', 'body'\].*'text'; set text_key"):
        read(tmp_path)
    write_parquet(tmp_path / "a.parquet", texts=["x", None])
    with pytest.raises(ValueError, match=r"a\.parquet row 2 has NoneType"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_is_an_error_not_an_early_end(tmp_path, name, damage):
    path = tmp_path / name
    text = b"".join(json.dumps({"text": str(i**9)}).encode() + b"\n" for i in range(3000))
    if name.endswith(".parquet"):
        write_parquet(path)
        whole = path.read_bytes()
    else:
        compress = gzip.compress if ".gz" in name else zstandard.ZstdCompressor().compress
        whole = compress(text)
    path.write_bytes(whole[: len(whole) * 2 // 3] if damage == "cut" else b"garbage" * 50)
    with pytest.raises(ValueError, match=f"data file {name} cannot be read.*repair"):
        read(tmp_path)


def test_an_unreadable_folder_inside_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    real_walk = sources.os.walk

    def walk(root, onerror):
        yield from real_walk(root, onerror=onerror)
        onerror(PermissionError(13, "Permission denied", f"{root}/locked"))

    monkeypatch.setattr(sources.os, "walk", walk)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied: .*locked\); give"):
        list_files("text", str(tmp_path))


def test_no_path_and_no_file_that_fits(tmp_path):
    with pytest.raises(ValueError, match=r"missing cannot be read \(No such file.*; give a file"):
        list_files("text", str(tmp_path / "missing"))
    (tmp_path / "a.md").write_text("x")
    for path in (tmp_path, tmp_path / "a.md"):
        with pytest.raises(ValueError, match=r"holds no file that fits.*\*\.parquet; convert"):
            list_files("text", str(path))
