"""Files to pieces of text: what there is below a folder, what of it is text, and where long text is cut.

By the end of its name a file is

- `.parquet`: a table, in whose column `text` each row has a document;
- `.jsonl`: JSON Lines, each line an object, whose `text` is a document;
- anything else: one document of UTF-8.

All but tables may be packed (`.jsonl.gz`). Files are read as streams: they may be larger than memory.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from ...protocol.errors import ShoalError

DOCUMENT_BYTES = 256 * 1024  # longer text is cut, so that one large file can be split and sharded too
SNIFFED_BYTES = 4096  # a file with a zero byte among its first ones is not text
MAX_LINE_BYTES = 256 << 20  # of JSON Lines
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
ROWS_TOGETHER = 256  # of a table, in memory

_BLANK = b"\0 \t\r\n"  # zeros are what a crash leaves at the end of a file


class DataError(ShoalError):
    """The corpus cannot be read or is too small."""

    code = "SHOAL-231"


class NotText(Exception):
    """A file is binary."""


class _Line(msgspec.Struct):
    text: str


_lines = msgspec.json.Decoder(_Line)


def files_in(root: Path, skipped: Callable[[str], bool]) -> list[Path]:
    """All below `root`, sorted; without files and folders of skipped names, which may hold far more than all others.

    Links are followed, to each folder once. DataError for a folder that cannot be read.
    """
    found: list[Path] = []
    seen = {root.resolve()}  # links may lead back
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        inside = {name: Path(folder, name).resolve() for name in folders if not skipped(name)}
        folders[:] = sorted(name for name, path in inside.items() if path not in seen)
        seen.update(inside[name] for name in folders)
        found += [path for name in files if not skipped(name) and (path := Path(folder, name)).is_file()]
    return sorted(found)


def pieces_in(path: Path) -> Iterator[bytes]:
    """What is in a file: pieces of 1 to `DOCUMENT_BYTES` bytes, of one document each, without zero bytes.

    Raises:
        DataError: it cannot be read, or something in it is not what it should be.
        NotText: it is binary; before any piece.
    """
    try:
        if path.suffix == ".parquet":
            yield from _in_table(path)
            return
        with _opened(path) as file:
            if 0 in file.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]:
                raise NotText
            unpacked = path.with_suffix("") if path.suffix in PACKED else path
            yield from _in_lines(path, file) if unpacked.suffix == ".jsonl" else _in_blocks(file)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", fix="make it readable or leave it out"
        ) from error


def _opened(path: Path) -> io.BufferedReader:
    if path.suffix not in PACKED:
        return path.open("rb")
    import pyarrow  # not above: a fifth of a second that few need

    path.stat()  # pyarrow says less of what is not there
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=PACKED[path.suffix]))


def _in_blocks(file: io.BufferedIOBase) -> Iterator[bytes]:
    """One document, cut at line ends where there are any."""
    rest = b""
    while block := file.read(DOCUMENT_BYTES):
        text = block.replace(b"\0", b"")
        if not text:
            break  # a hole, as of a file that was not written to its end
        rest += text
        while len(rest) > DOCUMENT_BYTES:
            end = rest.rfind(b"\n", 0, DOCUMENT_BYTES) + 1 or DOCUMENT_BYTES
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _in_lines(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB",
                fix='write each line as an object with "text", or leave the file out',
            )
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip(_BLANK)
        if line:
            yield from _document(_text_in(path, number, line))


def _text_in(path: Path, number: int, line: bytes) -> str:
    try:
        return _lines.decode(line).text
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, line {number}: {error}", fix='write each line as an object with "text", or leave the file out'
        ) from error


def _in_table(path: Path) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    path.stat()
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise DataError(
                    f"{path} has no column `text`, but {names}", fix="rename the one that has the documents"
                )
            for rows in table.iter_batches(ROWS_TOGETHER, columns=["text"]):
                for text in rows.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise DataError(
                            f"{path}: what is in `text` is of type {rows.column(0).type}",
                            fix="make it readable or leave it out",
                        )
                    yield from _document(text or "")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", fix="make it readable or leave it out") from error


def _document(text: str) -> Iterator[bytes]:
    return _in_blocks(io.BytesIO(text.encode("utf-8", "replace")))


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"cannot read {error.filename}: {error.strerror}", fix="make it readable or leave it out"
    ) from error
