import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cp_gdn.train.data import tokenizer as module
from cp_gdn.train.data.sources import Document
from cp_gdn.train.data.tokenizer import KNOWN_EOS, character_start, load_tokenizer

TEXT = "Der Zähler läuft, counting: one two three two one.\n" * 20


def save_bpe(folder: Path, *, special: str = "<|endoftext|>", truncate: bool = False) -> Path:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    if truncate:
        bpe.enable_truncation(4)
        bpe.enable_padding(length=4)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def document(text: bytes) -> Document:
    return Document(text, "a.txt", b"a.txt", len(text))


@pytest.mark.parametrize("name", [None, "bytes"])
def test_bytes_are_their_own_ids(name):
    tokenizer = load_tokenizer(name)
    text = bytes(range(256))
    (ids,) = tokenizer.encode([document(text)])
    assert ids.tolist() == list(text)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_a_tokenizer_file_or_its_folder_encodes_whole_documents(tmp_path):
    path = save_bpe(tmp_path, truncate=True)
    expected = Tokenizer.from_file(str(path))
    expected.no_truncation()
    expected.no_padding()
    for name in (path, tmp_path):
        tokenizer = load_tokenizer(str(name))
        ids, short = tokenizer.encode([document(TEXT.encode()), document(b"two")])
        assert ids.tolist() == expected.encode(TEXT).ids
        assert expected.decode(short.tolist()) == "two"
        assert tokenizer.vocab_size == expected.get_vocab_size() > 256
        assert tokenizer.eos_id == expected.token_to_id("<|endoftext|>")


def test_the_configured_end_of_document_wins_over_the_usual_names(tmp_path):
    path = save_bpe(tmp_path)
    usual = load_tokenizer(str(path))
    for named in ("t", {"content": "t"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.eos_id == Tokenizer.from_file(str(path)).token_to_id("t")
        assert tokenizer.identity != usual.identity
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(path)).identity == usual.identity


def test_holes_in_the_ids_count_as_vocabulary(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 999}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == 1000


def test_a_very_long_document_is_sliced_at_lines_and_characters(tmp_path, monkeypatch):
    path = save_bpe(tmp_path)
    whole = load_tokenizer(str(path)).encode([document(TEXT.encode())])[0]
    monkeypatch.setattr(module, "WHOLE_BYTES", 120)
    sliced = load_tokenizer(str(path)).encode([document(TEXT.encode()), document(b"one")])
    decode = Tokenizer.from_file(str(path)).decode
    assert decode(sliced[0].tolist()) == decode(whole.tolist()) == TEXT
    assert len(sliced[0]) <= len(whole) + len(TEXT) // 120 * 2
    assert decode(sliced[1].tolist()) == "one"
    parts = module._slices("éé\nééé".encode(), 4)
    assert [p.decode() for p in parts] == ["éé", "\n", "éé", "é"]


def test_character_start():
    text = "aé€😀".encode()  # 1 + 2 + 3 + 4 bytes
    assert [character_start(text, i) for i in range(10)] == [0, 1, 1, 3, 3, 3, 6, 6, 6, 6]
    assert character_start(b"\x80" * 20, 10) == 10  # not UTF-8: anywhere


def test_text_that_is_not_utf8_is_named(tmp_path):
    tokenizer = load_tokenizer(str(save_bpe(tmp_path)))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 .* at byte 2.*tokenizer=bytes"):
        tokenizer.encode([document(b"ok\xff")])


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*tokenizer\.json; give 'bytes'"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"'nowhere' but there is no file nowhere; give"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"cannot be loaded .*save it again"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path):
    save_bpe(tmp_path, special="<stop>")
    with pytest.raises(ValueError, match="none of the tokens") as error:
        load_tokenizer(str(tmp_path))
    assert KNOWN_EOS[0] in str(error.value) and "tokenizer_config.json" in str(error.value)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": "<absent>"}')
    with pytest.raises(ValueError, match="none of the tokens <absent>"):
        load_tokenizer(str(tmp_path))
    settings.write_text("[1]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        load_tokenizer(str(tmp_path))


def test_ids_are_unsigned(tmp_path):
    for name in ("bytes", str(save_bpe(tmp_path))):
        assert load_tokenizer(name).encode([document(b"abc")])[0].dtype == np.uint32
