"""The corpus: what is held out, who trains on what, and that a sampler resumes exactly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shoal.node.learning import data
from shoal.node.learning.data import Batches, Corpus, DataError, load_corpus
from shoal.node.learning.text_files import DOCUMENT_BYTES
from shoal.node.learning.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus("stdlib")


def test_stdlib_is_large_enough_and_split(stdlib: Corpus) -> None:
    heldout = sum(len(d.text) for d in stdlib.heldout_documents)
    assert stdlib.train_bytes + heldout > 10e6
    assert 0.02 < heldout / (stdlib.train_bytes + heldout) < 0.10
    assert not {d.digest for d in stdlib.train} & {d.digest for d in stdlib.heldout_documents}
    again = load_corpus("stdlib")
    assert again == stdlib


def test_stdlib_split_depends_on_names_only(stdlib: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python version's edited file stays on its side."""
    for name in ("ast.py", "json/decoder.py", "test/skipped.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("edited\n")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    edited = load_corpus("stdlib")
    assert {d.digest for d in edited.train + edited.heldout_documents} <= {
        d.digest for d in stdlib.train + stdlib.heldout_documents
    }
    assert len(edited.train + edited.heldout_documents) == 2


def test_shards_are_disjoint_complete_and_balanced(stdlib: Corpus) -> None:
    n = random.randint(2, 9)
    shards = [stdlib.shard(i, n) for i in range(n)]
    assert sum(len(s) for s in shards) == stdlib.train_bytes + len(stdlib.train)  # one end byte a document
    assert b"".join(s.tobytes() for s in shards) == data.tokens_of(stdlib.train).tobytes()
    longest = max(len(d.text) for d in stdlib.train)
    assert max(len(s) for s in shards) - min(len(s) for s in shards) <= 2 * longest + len(stdlib.train)


def test_batches_resume_exactly(stdlib: Corpus) -> None:
    seed = random.getrandbits(63)
    tokens = stdlib.shard(0, 4)
    batches = Batches(tokens, 4, 64, seed=seed)
    drawn = [batches.next() for _ in range(3)]
    state = batches.state_dict()
    following = [batch for batch, _ in zip(batches, range(3), strict=False)]
    resumed = Batches(tokens, 4, 64, seed=0)
    resumed.load_state_dict(state)
    assert all(torch.equal(resumed.next(), batch) for batch in following), f"seed {seed}"
    assert drawn[0].shape == (4, 64)
    assert drawn[0].dtype == torch.int64
    assert not torch.equal(drawn[0], drawn[1])
    text = tokens.tobytes()
    assert all(bytes(row.tolist()) in text for row in drawn[0])


def test_batches_reach_both_ends_and_read_memory_maps(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(bytes(range(10)))
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    starts = {int(row[0]) for row in Batches(mapped, 400, 4, seed=random.getrandbits(63)).next()}
    assert starts == set(range(7))


def test_heldout_is_fixed(stdlib: Corpus) -> None:
    first, again = stdlib.heldout(8, 128, seed=1), stdlib.heldout(8, 128, seed=1)
    assert first.shape == (8, 128)
    assert torch.equal(first, again)
    assert not torch.equal(first, stdlib.heldout(8, 128, seed=2))
    text = data.tokens_of(stdlib.heldout_documents).tobytes()
    assert all(bytes(row.tolist()) in text for row in first)


def test_own_text_file_is_cut_and_split(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"line {i} {random.random()}" for i in range(60_000)))
    corpus = load_corpus(str(path))
    pieces = corpus.train + corpus.heldout_documents
    assert len(pieces) > 4
    assert all(len(d.text) <= DOCUMENT_BYTES for d in pieces)
    assert sum(len(d.text) for d in pieces) == path.stat().st_size
    assert corpus.heldout_documents


def test_folder_skips_hidden_binary_and_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "copy.txt").write_text("one\n")
    (tmp_path / "b.md").write_text("two\n")
    (tmp_path / ".secret").write_text("hidden\n")
    (tmp_path / "c.bin").write_bytes(b"\x7f\0\1")
    (tmp_path / "d.txt").write_text("three\n", encoding="utf-16")
    corpus = load_corpus(str(tmp_path))
    assert sorted(d.text for d in corpus.train + corpus.heldout_documents) == [b"one\n", b"two\n"]
    assert "files=2 why=they are not UTF-8 text" in caplog.text


def test_corpus_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(str(i) * 100)
    corpus = load_corpus(str(tmp_path), max_bytes=250)
    assert sum(len(d.text) for d in corpus.train + corpus.heldout_documents) == 200
    assert "corpus cut" in caplog.text


@pytest.mark.parametrize("first", [b"\0", b"text\n" * 2000], ids=["binary", "text"])
def test_no_more_of_a_file_is_read_than_is_kept(tmp_path: Path, first: bytes) -> None:
    with (tmp_path / "0").open("wb") as file:
        file.write(first)
        file.truncate(1 << 40)  # a hole: larger than any memory
    (tmp_path / "1").write_text("\n".join(map(str, range(200_000))))
    corpus = load_corpus(str(tmp_path), max_bytes=1 << 20)
    read = sum(len(document.text) for document in (*corpus.train, *corpus.heldout_documents))
    assert 0 < read <= 1 << 20


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as missing:
        load_corpus(str(tmp_path / "nothing"))
    assert missing.value.fix
    with pytest.raises(DataError, match="no text"):
        load_corpus(str(tmp_path))
    (tmp_path / "small.txt").write_text("only one document")
    with pytest.raises(DataError, match="too little text"):
        load_corpus(str(tmp_path))
    with pytest.raises(DataError, match="do not fill one window"):
        Batches(np.zeros(10, dtype=np.uint8), 1, 11, seed=0)


def test_a_text_whose_hash_is_held_out_is_a_text_all_the_same(tmp_path: Path) -> None:
    def corpus_of(*numbers: int) -> Corpus:
        for old in tmp_path.iterdir():
            old.unlink()
        for number in numbers:
            (tmp_path / f"{number}.txt").write_text(f"text {number}")
        return load_corpus(str(tmp_path))

    whole = corpus_of(*range(200))
    held = [int(document.text.split()[1]) for document in whole.heldout_documents]
    assert len(held) > 1
    with pytest.raises(DataError, match="too little text"):
        corpus_of(held[0])
    two = corpus_of(*held[:2])
    assert (len(two.train), len(two.heldout_documents)) == (1, 1)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=200))
def test_tokenizer_is_the_bytes(text: str) -> None:
    tokenizer = byte_tokenizer(256)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_tokenizer(128).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == data.VOCAB_SIZE
    text = "déjà vu, \tĀ🐟\r\n  end"
    assert loaded.encode(text) == list(text.encode())
    assert loaded.decode(loaded.encode(text)) == text
    assert [loaded.decode([byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]
