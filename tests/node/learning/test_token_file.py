"""A peer's tokens on its disk: the same as those made in memory, made once, and made again when they must be."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from shoal.node.learning import token_file
from shoal.node.learning.data import Batches, Document, Tokens, load_corpus, tokens_of
from shoal.node.learning.text_files import DataError
from shoal.node.learning.token_file import check_text, training_tokens


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        lines = [json.dumps({"text": f"{random.random()} " * random.randint(1, 400)}) for _ in range(100)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines + lines[:10]))  # some of it twice
    return folder


def made(text: Path, folder: Path, index: int = 0, count: int = 1, **more: object) -> Tokens:
    return training_tokens(str(text), folder, shard=(index, count), **{"encode": tokens_of, **more})  # type: ignore[arg-type]


def test_they_are_those_of_the_text_in_memory(text: Path, tmp_path: Path) -> None:
    corpus, n = load_corpus(str(text)), random.randint(2, 5)
    for index in range(n):
        found = made(text, tmp_path / "tokens", index, n)
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
        np.testing.assert_array_equal(found, corpus.shard(index, n))
    [file] = (tmp_path / "tokens").iterdir()  # the last one's
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_is_larger_than_memory_is_made_in_parts(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "TOGETHER", 50_000)
    monkeypatch.setattr(token_file, "SAID_EVERY", 100_000)
    largest, said = 0, list[str]()

    def encode(documents: list[Document]) -> Tokens:
        nonlocal largest
        largest = max(largest, sum(len(document.text) for document in documents))
        return tokens_of(documents).astype(np.int32)

    corpus = load_corpus(str(text))
    found = made(text, tmp_path / "tokens", encode=encode, say=said.append)
    assert found.dtype == np.int32
    documents = bytes(found.astype(np.uint8)).split(b"\0")
    assert sorted(documents) == sorted([b"", *(document.text for document in corpus.train)])
    assert 50_000 <= largest < 60_000
    assert any(what.startswith("reading") for what in said)
    assert any(what.startswith("making") for what in said)


def test_they_are_made_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokens"
    first = made(text, folder)
    with monkeypatch.context() as patch:
        patch.setattr(token_file, "documents_in", lambda source: pytest.fail("read again"))
        np.testing.assert_array_equal(made(text, folder), first)
    for change in (
        lambda: made(text, folder, 0, 2),
        lambda: made(text, folder, tokenizer=b"another"),
        lambda: (text / "new.txt").write_text("one more") and made(text, folder),
        lambda: (text / "new.txt").write_text("another!") and made(text, folder),
    ):
        before = os.listdir(folder)
        change()
        assert len(os.listdir(folder)) == 1
        assert os.listdir(folder) != before


def test_what_is_damaged_is_made_again(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    wanted = np.array(made(text, folder))
    [file] = folder.iterdir()
    os.truncate(file, len(wanted) - 1)
    (folder / "partial").write_bytes(b"of a process that was killed")
    (folder / "notes.txt").write_text("a user's own")
    np.testing.assert_array_equal(made(text, folder), wanted)
    assert {path.name for path in folder.iterdir()} == {file.name, "notes.txt"}


def test_a_full_disk_is_named_and_nothing_stays(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here")
    try:
        with pytest.raises(DataError, match="No space left on device") as refused:
            made(text, folder)
        assert "--data-shard" in refused.value.fix
        assert os.listdir(folder) == []
        assert len(made(text, folder, 0, 20))
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # what was made is mapped


def test_where_no_file_can_be_is_named(text: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write .*tokens: File exists"):
        made(text, tmp_path / "tokens")


def test_what_ends_on_the_way_leaves_nothing(text: Path, tmp_path: Path) -> None:
    def fail(documents: list[Document]) -> Tokens:
        raise RuntimeError("a tokenizer that fails")

    with pytest.raises(RuntimeError, match="that fails"):
        made(text, tmp_path / "tokens", encode=fail)
    assert os.listdir(tmp_path / "tokens") == []


def test_names_need_not_be_text(text: Path, tmp_path: Path) -> None:
    """As file systems have them: a name in another encoding than UTF-8, and what somebody put beside the tokens."""
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/texts-\xff"))
    text.rename(named)
    wanted = np.array(made(named, tmp_path / "tokens"))
    [file] = (tmp_path / "tokens").iterdir()
    (tmp_path / "tokens" / f"{file.name.partition('-')[0]}-old.copy").write_bytes(b"")
    np.testing.assert_array_equal(made(named, tmp_path / "tokens"), wanted)


def test_a_shard_without_documents_is_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}")
    sizes = []
    for index in range(3):
        tokens = made(tmp_path / "texts", tmp_path / "tokens", index, 3)
        sizes.append(len(tokens))
        np.testing.assert_array_equal(made(tmp_path / "texts", tmp_path / "tokens", index, 3), tokens)
    assert sorted(sizes) == [0, 0, 7]
    with pytest.raises(DataError, match="too little text: 0 bytes"):
        Batches(made(tmp_path / "texts", tmp_path / "tokens", sizes.index(0), 3), 1, 8, seed=0)


def test_a_text_is_checked_without_reading_all_of_it(text: Path) -> None:
    corpus = load_corpus(str(text))
    everything = corpus.train + corpus.heldout_documents
    documents, read = check_text(str(text))
    assert documents == len(everything)
    assert read > sum(len(document.text) for document in everything)  # some of it is there twice
    (text / "9.jsonl").write_text("no JSON")
    with pytest.raises(DataError, match="line 1"):
        check_text(str(text))
    documents, read = check_text(str(text), 10_000)
    assert 1 < documents < len(everything)
    assert 10_000 < read < 20_000
    with pytest.raises(DataError, match="line 1"):
        made(text, text.parent / "tokens")


def test_damaged_tokens_do_not_reach_a_model() -> None:
    tokens = np.array([1, 2, 3, 4] * 10, dtype=np.int32)
    assert Batches(tokens, 8, 4, seed=0, num_tokens=5).next().max() == 4
    for damage in (5, -1, 2**31 - 1):
        tokens[random.randrange(10, 30)] = damage
        with pytest.raises(DataError, match="damaged") as refused:
            Batches(tokens, 400, 8, seed=random.getrandbits(63), num_tokens=5).next()
        assert "tokens" in refused.value.fix
