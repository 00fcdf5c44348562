"""From a folder to documents: which files belong to a corpus, and the documents inside each.

A .txt (or .py) file is one document; a line of .jsonl and a row of .parquet are one document each.
Files may be compressed as .gz or .zst. Documents are bytes, UTF-8 where they come from jsonl or
parquet.
"""

import gzip
import io
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TEXT_SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
SUPPORTED = "*.txt, *.jsonl, *.txt.gz, *.txt.zst, *.jsonl.gz, *.jsonl.zst, *.parquet"

# Third-party code, tests (some of them not UTF-8), generated tables: not prose that a model should
# learn from.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    | {"idlelib", "lib2to3", "turtledemo", "encodings"}
)


class SourceFile(NamedTuple):
    """One file of a corpus; ``name`` is relative to the corpus's root, with forward slashes."""

    name: str
    path: Path
    size: int  # bytes
    mtime_ns: int


class Document(NamedTuple):
    """One document. ``where`` names it in messages, ``split_key`` decides its side of the split."""

    text: bytes
    where: str
    split_key: bytes
    position: int  # bytes of its file read so far, for the progress bar


def list_files(kind: str, path: str | None) -> list[SourceFile]:
    """The files of a corpus, sorted by name.

    Names that begin with a dot are skipped. Raises ValueError where the path cannot be read or
    holds no file that fits.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    try:
        if stat.S_ISDIR(root.stat().st_mode):
            skipped = STDLIB_SKIPPED if kind == "stdlib" else frozenset()
            base, paths = root, _walk(root, skipped)
        else:
            base, paths = root.parent, iter([root])
        wanted = _is_python if kind == "stdlib" else _is_supported
        files = [_source_file(path, base) for path in paths if wanted(path.name)]
    except OSError as error:
        raise ValueError(
            f"data path {root} cannot be read ({error.strerror}: {error.filename}); give a file or "
            "folder that exists and that this user may read"
        ) from None
    if not files:
        rule = "*.py" if kind == "stdlib" else SUPPORTED
        raise ValueError(
            f"data path {root} holds no file that fits; files read are {rule}; convert the data to "
            "one of these or give another path"
        )
    return sorted(files)


def _source_file(path: Path, base: Path) -> SourceFile:
    status = path.stat()
    name = path.relative_to(base).as_posix()
    return SourceFile(name, path, status.st_size, status.st_mtime_ns)


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder in silence

    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _is_python(name: str) -> bool:
    return name.endswith(".py")


def _is_supported(name: str) -> bool:
    return name.endswith(".parquet") or _without_compression(name).endswith(TEXT_SUFFIXES)


def _without_compression(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.endswith(COMPRESSIONS) else name


def read_documents(file: SourceFile, text_key: str) -> Iterator[Document]:
    """The documents of one file in order, empty ones left out.

    Raises ValueError where the file cannot be read or decompressed, a line is not JSON, or
    ``text_key`` is no text.
    """
    try:
        read = _read_parquet if file.name.endswith(".parquet") else _read_text
        yield from (document for document in read(file, text_key) if document.text)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"data file {file.name} cannot be read ({error}); a corpus file must be readable and "
            "complete; repair it or take it out"
        ) from error


def _read_text(file: SourceFile, text_key: str) -> Iterator[Document]:
    with open(file.path, "rb", buffering=0) as raw:
        stream: io.BufferedIOBase
        if file.name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=io.BufferedReader(raw))
        elif file.name.endswith(".zst"):
            stream = io.BufferedReader(_ZstdReader(raw), 1 << 20)
        else:
            stream = io.BufferedReader(raw, 1 << 20)
        if not _without_compression(file.name).endswith(".jsonl"):
            yield Document(stream.read(), file.name, file.name.encode(), file.size)
            return
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                where = f"{file.name} line {number}"
                text = _json_text(line, where, text_key)
                yield Document(text, where, text, raw.tell())


def _json_text(line: bytes, where: str, text_key: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}); each line of a jsonl file is one JSON object; repair "
            "it"
        ) from None
    if not isinstance(record, dict) or text_key not in record:
        found = f"has the fields {sorted(record)}" if isinstance(record, dict) else "is no object"
        raise ValueError(
            f"{where} {found} but the text is read from {text_key!r}; set text_key to the field "
            "that holds it"
        )
    return _encode(record[text_key], where, text_key)


def _encode(value: object, where: str, text_key: str) -> bytes:
    if not isinstance(value, str):
        raise ValueError(
            f"{where} has {type(value).__name__} in {text_key!r} but a document is a string; set "
            "text_key to a field of text, or take the record out"
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is not valid Unicode ({error.reason}); repair the text"
        ) from None


def _read_parquet(file: SourceFile, text_key: str) -> Iterator[Document]:
    import pyarrow as pa  # slow to import, and few corpora need it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            if text_key not in table.schema_arrow.names:
                raise ValueError(
                    f"{file.name} has the columns {table.schema_arrow.names} but the text is read "
                    f"from {text_key!r}; set text_key to the column that holds it"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{file.name} row {row}"
                    text = _encode(value, where, text_key)
                    position = file.size * row // table.metadata.num_rows
                    yield Document(text, where, text, position)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames; a file that ends inside a frame is an error, not an early end."""

    def __init__(self, raw: io.RawIOBase):
        import zstandard

        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._raw = raw
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _advance(self) -> bool:
        """Decompresses the next piece of the file; False at its end."""
        data = b""
        if self._frame is not None and self._frame.eof:
            data, self._frame = self._frame.unused_data, None
        data = data or self._raw.read(1 << 17) or b""
        if not data:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._pending = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise OSError(str(error)) from error
        return True
