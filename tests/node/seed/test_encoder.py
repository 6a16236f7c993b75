"""A run's own tokenizer: documents to tokens, and what is none."""

from __future__ import annotations

import pytest
from shoal.node.learning.data import Document
from shoal.node.learning.text_files import DataError
from shoal.node.learning.tokenizer import Encoder, byte_tokenizer, read_tokenizer

TOKENIZER = byte_tokenizer(16).backend_tokenizer.to_str().encode()
DOCUMENTS = [Document(b"1", "grüße".encode()), Document(b"2", b"ab\xff")]


def test_documents_end_with_the_end() -> None:
    wanted = [*"grüße".encode(), 7, *"ab\N{REPLACEMENT CHARACTER}".encode(), 7]
    assert Encoder(TOKENIZER, 7)(DOCUMENTS).tolist() == wanted
    assert Encoder(TOKENIZER, [7, 8])(DOCUMENTS).tolist() == wanted
    assert Encoder(TOKENIZER, [])(DOCUMENTS).tolist() == Encoder(TOKENIZER, None)(DOCUMENTS).tolist()
    assert Encoder(TOKENIZER, None)(DOCUMENTS).tolist() == [token for token in wanted if token != 7]


def test_many_documents_are_taken_some_at_a_time() -> None:
    documents, told = DOCUMENTS * 13, []
    assert Encoder(TOKENIZER, 7, progress=lambda: told.append(1))(documents).tolist() == [
        token for document in documents for token in Encoder(TOKENIZER, 7)([document]).tolist()
    ]
    assert len(told) > 2
    assert len(Encoder(TOKENIZER, 7)([])) == 0


def test_a_tokenizer_saved_with_truncation_and_padding_cuts_and_fills_nothing() -> None:
    saved = byte_tokenizer(16).backend_tokenizer
    saved.enable_truncation(3)
    saved.enable_padding(length=5, pad_id=9, pad_token="x")
    told = Encoder(saved.to_str().encode(), 7)(DOCUMENTS)
    assert told.tolist() == Encoder(TOKENIZER, 7)(DOCUMENTS).tolist()


def test_the_same_as_a_hugging_face_tokenizer() -> None:
    tokenizer = read_tokenizer(TOKENIZER, 16, {"bos_token_id": 9, "eos_token_id": 10, "pad_token_id": 11})
    assert tokenizer("grüße").input_ids == list("grüße".encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (9, 10, 11)


def test_of_several_ends_the_first_is_exported() -> None:
    assert read_tokenizer(TOKENIZER, 16, {"eos_token_id": [10, 11]}).eos_token_id == 10
    assert read_tokenizer(TOKENIZER, 16, {"eos_token_id": []}).eos_token_id is None
    none = read_tokenizer(TOKENIZER, 16, {"eos_token_id": None, "pad_token_id": -1})
    assert (none.bos_token_id, none.eos_token_id, none.pad_token_id) == (None, None, None)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Encoder(data, None)
