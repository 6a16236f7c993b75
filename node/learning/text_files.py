"""Files to pieces of text: what there is below a folder, what of it is text, and where long text is cut.

Text is UTF-8, plain or as JSON Lines (`.jsonl`): each line an object, whose `text` is a document of its own.
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


class DataError(ShoalError):
    """The corpus cannot be read or is too small."""

    code = "SHOAL-231"


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


def read_text(path: Path, most: int) -> bytes:
    """The file's bytes, or `most` of them and one more; none if it is binary. It may be larger than memory.

    DataError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
            text = b"" if 0 in head else head + file.read(max(0, most + 1 - len(head)))
    except OSError as error:
        _unreadable(error)
    return text.replace(b"\0", b"")


def pieces_of(path: Path, text: bytes, *, whole: bool = True) -> Iterator[bytes]:
    """What is in a file's text: pieces of at most `DOCUMENT_BYTES`, of one document each.

    Args:
        whole: whether the text is all of the file. If not, the last of JSON Lines is left out.

    Raises:
        DataError: one of JSON Lines is not what it should be.
    """
    if path.suffix != ".jsonl":
        yield from _cut(text)
        return
    lines = io.BytesIO((text if whole else text[: text.rfind(b"\n") + 1]).removeprefix(codecs.BOM_UTF8))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield from _cut(_text_in(path, number, line))


def _text_in(path: Path, number: int, line: bytes) -> bytes:
    try:
        return _lines.decode(line).text.encode("utf-8", "replace").replace(b"\0", b"")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fix = 'each line of a .jsonl file is an object with "text": write the document there, or leave the file out'
        raise DataError(f"{path}, line {number}: {error}", fix=fix) from error


def _cut(text: bytes) -> Iterator[bytes]:
    """Pieces of at most DOCUMENT_BYTES, ending at line ends where there are any."""
    start = 0
    while start < len(text):
        end = start + DOCUMENT_BYTES
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _unreadable(error: OSError) -> NoReturn:
    fix = "make it readable or leave it out"
    raise DataError(f"cannot read {error.filename}: {error.strerror}", fix=fix) from error
