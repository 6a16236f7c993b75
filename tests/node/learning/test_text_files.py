"""Files as text: links, what cannot be read, JSON Lines and tables, packed ones, cut short and damaged."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from shoal.node.learning import text_files
from shoal.node.learning.data import load_corpus
from shoal.node.learning.text_files import DOCUMENT_BYTES, DataError, NotText, pieces_in


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def pieces(folder: Path, name: str, data: bytes) -> list[bytes]:
    (folder / name).write_bytes(data)
    return list(pieces_in(folder / name))


def texts_in(folder: Path) -> list[str]:
    corpus = load_corpus(str(folder))
    return sorted(d.text.decode() for d in corpus.train + corpus.heldout_documents)


def test_links_are_followed_and_may_lead_back(tmp_path: Path) -> None:
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder, text in ((texts / "in", "one\n"), (elsewhere, "two\n")):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(text)
    (texts / "link").symlink_to(elsewhere)
    (texts / "in" / "back").symlink_to(texts)
    (elsewhere / "again").symlink_to(elsewhere)
    assert texts_in(texts) == ["one\n", "two\n"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    locked = tmp_path / "locked"
    locked.mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:  # root, whom tests may run as, reads everything
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"cannot read {locked}: Permission denied"):
        load_corpus(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1)), st.booleans())
def test_each_line_is_a_document(tmp_path: Path, texts: list[str], ascii_only: bool) -> None:
    lines = "\n".join(json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) for i, text in enumerate(texts))
    wanted = [text.replace("\0", "").encode("utf-8", "replace") for text in texts]
    data = lines.encode("utf-8", "surrogatepass")
    if not ascii_only and any("\ud800" <= letter <= "\udfff" for letter in lines):
        return  # no such file is UTF-8
    assert pieces(tmp_path, "a.jsonl", data) == [text for text in wanted if text]


def test_lines_stand_beside_files_and_long_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\r\n\n{"text": "two", "lang": "en"}\n{"text": ""}\n')
    (tmp_path / "b.json").write_text('{"text": "three"}')
    assert texts_in(tmp_path) == ["one", "two", '{"text": "three"}']
    marked = b"\xef\xbb\xbf" + b'{"text": "as Windows writes it"}'
    assert pieces(tmp_path, "a.jsonl", marked) == [b"as Windows writes it"]
    long = "word\n" * (DOCUMENT_BYTES // 2)
    found = pieces(tmp_path, "a.jsonl", json.dumps({"text": long}).encode())
    assert b"".join(found).decode() == long
    assert all(len(piece) <= DOCUMENT_BYTES for piece in found)


def test_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    """However long its lines are, as one would cut it all at once."""
    for _ in range(10):
        sizes = [random.choice((0, 1, 50, 5_000, DOCUMENT_BYTES, 2 * DOCUMENT_BYTES)) for _ in range(20)]
        text = b"\n".join(b"x" * max(0, size + random.randint(-2, 2)) for size in sizes)
        wanted, start = [], 0
        while start < len(text):
            end = start + DOCUMENT_BYTES
            if end < len(text):
                end = text.rfind(b"\n", start, end) + 1 or end
            wanted.append(text[start:end])
            start = end
        assert pieces(tmp_path, "a.txt", text) == wanted, sizes


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_are_what_is_in_them(ending: str, tmp_path: Path) -> None:
    pack = PACK[ending]
    lines = b"".join(b'{"text": "%06d"}\n' % random.randrange(10**6) for _ in range(20_000))
    half = len(lines) // 2
    wanted = pieces(tmp_path, "a.jsonl", lines)
    assert (
        pieces(tmp_path, f"a.jsonl{ending}", pack(lines[:half]) + pack(lines[half:])) == wanted
    )  # as parts are joined
    text = b"words and words\n" * 50_000
    assert pieces(tmp_path, f"a.txt{ending}", pack(text)) == pieces(tmp_path, "a.txt", text)
    with pytest.raises(NotText):
        pieces(tmp_path, f"a.tar{ending}", pack(b"name" + bytes(500) + text))
    assert pieces(tmp_path, f"empty{ending}", b"") == []
    for damaged in (pack(lines)[:-3], pack(lines)[:1000], b"not packed at all"):
        with pytest.raises(DataError, match=rf"cannot read .*a\.jsonl\{ending}: ") as refused:
            pieces(tmp_path, f"a.jsonl{ending}", damaged)
        assert refused.value.fix
    with pytest.raises(DataError, match="No such file"):
        list(pieces_in(tmp_path / f"none{ending}"))


def test_rows_of_a_table_are_documents(tmp_path: Path) -> None:
    texts = [random.choice(("", "a\0b", "ä" * 5, "word\n" * DOCUMENT_BYTES)) for _ in range(5)] + ["last"]
    table = pyarrow.table({"id": range(len(texts) + 1), "text": [*texts, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = list(pieces_in(tmp_path / "a.parquet"))
    assert b"".join(found) == "".join(texts).replace("\0", "").encode()
    assert all(0 < len(piece) <= DOCUMENT_BYTES for piece in found)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-1], bytes(len(whole))):
        with pytest.raises(DataError, match=r"cannot read .*b\.parquet: "):
            pieces(tmp_path, "b.parquet", damaged)
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no column `text`, but content, n"):
        list(pieces_in(tmp_path / "c.parquet"))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="type int64"):
        list(pieces_in(tmp_path / "d.parquet"))


def test_zeros_that_a_crash_has_left_are_no_text(tmp_path: Path) -> None:
    text = b"words\n" * 10_000
    for name in ("a.txt", "a.jsonl"):
        whole = text if name == "a.txt" else b'{"text": "one"}\n' * 1000
        wanted = pieces(tmp_path, name, whole)
        assert pieces(tmp_path, name, whole + bytes(3 * DOCUMENT_BYTES)) == wanted
    assert pieces(tmp_path, "a.jsonl", b'{"text": "%s"}' % (b"x" * 5000) + bytes(10) + b"\n" + whole) == [
        b"x" * 5000,
        *wanted,
    ]


def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1000)
    line = b'{"text": "%s"}\n'
    assert pieces(tmp_path, "a.jsonl", line % (b"x" * 900)) == [b"x" * 900]
    with pytest.raises(DataError, match="line 2: longer than"):
        pieces(tmp_path, "a.jsonl", line % b"one" + line % (b"x" * 1000))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'"text"',
        b'{"content": "x"}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": null}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_document_is_named_with_its_line(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: ") as refused:
        load_corpus(str(tmp_path))
    assert '"text"' in refused.value.fix
