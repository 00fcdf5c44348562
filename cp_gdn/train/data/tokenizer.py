"""From documents to token ids: bytes as they are, or a tokenizer.json of the tokenizers library.

Every document ends with ``eos_id``, so a model learns where texts end and can be sampled from.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cp_gdn.train.data.sources import Document

KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
# Longer documents are tokenised in slices: an encoding takes up to a hundred times its text's
# memory.
WHOLE_BYTES = 16 << 20


class TextTokenizer(Protocol):
    """Ids lie in [0, vocab_size); ``identity`` changes whenever the ids of a text may change."""

    vocab_size: int
    eos_id: int
    identity: str

    def encode(self, documents: Sequence[Document]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each document, without eos."""
        ...


class ByteTokenizer:
    """One token a byte, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    identity = "bytes"

    def encode(self, documents: Sequence[Document]) -> list[npt.NDArray[np.uint32]]:
        return [np.frombuffer(d.text, dtype=np.uint8).astype(np.uint32) for d in documents]


class FileTokenizer:
    """A tokenizer.json.

    A document ends with the eos_token of a tokenizer_config.json beside it, or one of KNOWN_EOS.
    Nothing but eos is added to a document, and truncation or padding that the file asks for is
    switched off. Documents over 16 MiB are tokenised in slices that end after a line, which can
    change the tokens next to the cuts.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        content = path.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"tokenizer {path} cannot be loaded ({error}); it must be a tokenizer.json written "
                "by the tokenizers library; save it again with Tokenizer.save"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes
        self.eos_id = _eos_id(vocabulary, path)
        self.identity = f"{hashlib.sha256(content).hexdigest()} eos {self.eos_id}"

    def encode(self, documents: Sequence[Document]) -> list[npt.NDArray[np.uint32]]:
        texts: list[str] = []
        counts: list[int] = []
        for document in documents:
            slices = _slices(document.text, WHOLE_BYTES)
            counts.append(len(slices))
            try:
                texts.extend(part.decode() for part in slices)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{document.where} is not UTF-8 ({error.reason} at byte {error.start}) and a "
                    "tokenizer.json reads text; convert the file to UTF-8 or use tokenizer=bytes"
                ) from None
        encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in range(count)])
            for count in counts
        ]


def load_tokenizer(name: str | None) -> TextTokenizer:
    """The tokenizer for "bytes" (or None), a tokenizer.json, or a folder that holds one.

    Raises ValueError where there is no tokenizer.json, or one that cannot be used.
    """
    if name is None or name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer is {name!r} but there is no file {file}; give 'bytes', a tokenizer.json or "
            "a folder holding one"
        )
    try:
        return FileTokenizer(file)
    except OSError as error:
        raise ValueError(
            f"tokenizer {file} cannot be read ({error.strerror}); give a file that this user may "
            "read"
        ) from None


def _eos_id(vocabulary: dict[str, int], path: Path) -> int:
    settings_path = path.parent / "tokenizer_config.json"
    candidates: tuple[str, ...] = KNOWN_EOS
    if settings_path.is_file():
        try:
            settings: Any = json.loads(settings_path.read_bytes())
            named = settings.get("eos_token")
        except (ValueError, AttributeError):
            raise ValueError(
                f"{settings_path} is not a JSON object; repair it, or remove it to use a usual eos "
                "token"
            ) from None
        named = named.get("content") if isinstance(named, dict) else named
        candidates = (named,) if named else KNOWN_EOS
    for token in candidates:
        if token in vocabulary:
            return vocabulary[token]
    raise ValueError(
        f"tokenizer {path} has none of the tokens {', '.join(candidates)} to end a document with; "
        'put a tokenizer_config.json with "eos_token" beside it that names one of its tokens'
    )


def _slices(text: bytes, limit: int) -> list[bytes]:
    """``text`` in parts of at most ``limit`` bytes, ending with a line or else a character."""
    parts = []
    start = 0
    while len(text) - start > limit:
        cut = text.rfind(b"\n", start, start + limit) + 1
        cut = cut if cut > start else character_start(text, start + limit)
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def character_start(text: bytes, index: int) -> int:
    """The greatest position <= ``index`` not inside a UTF-8 character; ``index`` if not UTF-8."""
    for back in range(min(4, index + 1)):
        if text[index - back] & 0xC0 != 0x80:
            return index - back
    return index
