"""Files as text: links, what cannot be read, and JSON Lines whole, cut short and damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.node.learning.data import load_corpus
from shoal.node.learning.text_files import DOCUMENT_BYTES, DataError, pieces_of

LINES = Path("a.jsonl")


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


@given(st.lists(st.text(min_size=1)), st.booleans())
def test_each_line_is_a_document(texts: list[str], ascii_only: bool) -> None:
    lines = "\n".join(json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) for i, text in enumerate(texts))
    wanted = [text.replace("\0", "").encode("utf-8", "replace") for text in texts]
    data = lines.encode("utf-8", "surrogatepass")
    if not ascii_only and any("\ud800" <= letter <= "\udfff" for letter in lines):
        return  # no such file is UTF-8
    assert list(pieces_of(LINES, data)) == [text for text in wanted if text]


def test_lines_stand_beside_files_and_long_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\r\n\n{"text": "two", "lang": "en"}\n{"text": ""}\n')
    (tmp_path / "b.json").write_text('{"text": "three"}')
    assert texts_in(tmp_path) == ["one", "two", '{"text": "three"}']
    marked = b"\xef\xbb\xbf" + b'{"text": "as Windows writes it"}'
    assert list(pieces_of(LINES, marked)) == [b"as Windows writes it"]
    long = "word\n" * (DOCUMENT_BYTES // 2)
    pieces = list(pieces_of(LINES, json.dumps({"text": long}).encode()))
    assert b"".join(pieces).decode() == long
    assert all(len(piece) <= DOCUMENT_BYTES for piece in pieces)


def test_the_last_line_of_a_part_is_left_out(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%03d"}\n' % i for i in range(100))
    size = len(lines) // 100
    for most in (0, 1, size - 1, size, size + 1, 5 * size, len(lines) - 1):
        found = list(pieces_of(LINES, lines[:most], whole=False))
        assert found == [b"%03d" % i for i in range(most // size)]
    (tmp_path / "a.jsonl").write_bytes(lines)
    corpus = load_corpus(str(tmp_path), max_bytes=500)
    assert len(corpus.train) + len(corpus.heldout_documents) == 500 // size


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
