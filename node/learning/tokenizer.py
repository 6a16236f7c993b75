"""The byte tokenizer as a Hugging Face tokenizer, so that an exported model loads with AutoTokenizer.

Token id == byte value, 256 tokens, no special ones: a special token would have to be spelled with a character that
text may contain. Byte-level BPE without merges is just that: the pre-tokenizer writes each byte as one printable
character, and the vocabulary maps that character back to the byte. Byte 0 ends a document (data.py); text itself
never encodes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .data import VOCAB_SIZE, Document, Tokens
from .text_files import DataError

TOGETHER = 8  # documents: what is known of their tokens while they are made takes a hundred times their bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte, by byte value, as byte-level BPE writes them.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(VOCAB_SIZE)]


def first_end(end: int | Sequence[int] | None) -> int | None:
    """The token that ends a document. A config may list several that end a text, as chat models do; none at all too."""
    if end is None or isinstance(end, int):
        return end
    return end[0] if end else None


class Encoder:
    """Documents to tokens by a tokenizer.json; each ends with `end`, if there is one.

    Whole ones and nothing else: how texts of a batch were once cut or filled up, which the file may say, is left out.

    Args:
        progress: called now and then, as this may take minutes.

    Raises DataError if the bytes are no tokenizer.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        end: int | Sequence[int] | None,
        *,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # tokenizers raises no class of its own
            raise DataError(f"the run's tokenizer cannot be read: {error}", fix="ask the run's founder") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        first = first_end(end)
        self._end = [] if first is None else [first]
        self._progress = progress

    @property
    def num_tokens(self) -> int:
        """That a model has to know: one more than the largest of its tokens."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __call__(self, documents: Sequence[Document]) -> Tokens:
        parts = [np.empty(0, dtype=np.int32)]
        for start in range(0, len(documents), TOGETHER):
            texts = [document.text.decode("utf-8", "replace") for document in documents[start : start + TOGETHER]]
            tokens: list[int] = []
            for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
                tokens += encoding.ids
                tokens += self._end
            parts.append(np.array(tokens, dtype=np.int32))
            self._progress()
        return np.concatenate(parts)


def read_tokenizer(tokenizer_json: bytes, context_length: int, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The same as a Hugging Face tokenizer, for `save_pretrained`, with the special tokens of the model's config."""
    from transformers import PreTrainedTokenizerFast  # not above: seconds that peers without a backbone need not spend

    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    special: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = first_end(config.get(f"{name}_id"))
        text = tokenizer.id_to_token(token) if token is not None and token >= 0 else None
        special |= {} if text is None else {name: text}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context_length, **special)


def byte_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose `encode(text)` is `list(text.encode())`. `save_pretrained` writes it next to a model."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context_length, clean_up_tokenization_spaces=False
    )
