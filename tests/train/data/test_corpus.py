import json
import math
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from cp_gdn.train.data import DataConfig, build_corpus, corpus, unigram_bits_per_byte, writing
from tests.train.data.helpers import byte_documents, documents, text_config, write_texts
from tests.train.data.test_tokenizer import save_bpe


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def test_bytes_come_back_and_each_file_is_on_one_side(tmp_path):
    texts = write_texts(tmp_path / "texts")
    built = build_corpus(text_config(tmp_path / "texts", tmp_path / "cache"))
    train, val = byte_documents(built.train), byte_documents(built.val)
    assert sorted(train + val) == sorted(texts.values())
    assert train and val and not set(train) & set(val)
    assert (built.vocab_size, built.eos_id, built.train.tokens.dtype) == (257, 256, np.uint16)
    assert built.train.num_bytes == sum(map(len, train))
    assert built.train.bytes_per_token == built.bytes_per_token == 1.0
    assert isinstance(built.train.tokens.base, np.memmap)


def test_a_tokenizer_file_encodes_the_same_texts(tmp_path):
    texts = write_texts(tmp_path / "texts")
    path = save_bpe(tmp_path / "bpe")
    config = text_config(tmp_path / "texts", tmp_path / "cache", tokenizer=str(path.parent))
    built = build_corpus(config)
    decode = Tokenizer.from_file(str(path)).decode
    found = [decode(d[:-1]) for d in documents(built.train) + documents(built.val)]
    assert sorted(found) == sorted(t.decode() for t in texts.values())
    val = documents(built.val)
    targets = sum(len(d) - 1 for d in val)
    expected = sum(len(decode(d[:-1]).encode()) for d in val) / targets
    assert built.val.bytes_per_token == pytest.approx(expected)
    assert expected > 1.5
    assert built.bits_per_byte(2.0) == pytest.approx(2.0 / math.log(2) / expected)


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", [f"w{i} w69999 w{i + 65_530}" for i in range(20)])
    config = text_config(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=str(tmp_path))
    built = build_corpus(config)
    assert built.train.tokens.dtype == np.uint32
    expected = [[i, 69_999, i + 65_530, 70_000] for i in range(20)]
    assert sorted(documents(built.train) + documents(built.val)) == expected


def test_the_split_of_records_follows_the_text_not_the_order(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    sides = []
    for name, order in (("a", texts), ("b", random.Random(0).sample(texts, 200))):
        write_jsonl(tmp_path / f"{name}.jsonl", order)
        config = text_config(tmp_path / f"{name}.jsonl", tmp_path / "cache", val_fraction=0.2)
        built = build_corpus(config)
        sides.append(set(byte_documents(built.val)))
        assert len(byte_documents(built.train)) + len(sides[-1]) == 200
    assert sides[0] == sides[1]
    assert 20 <= len(sides[0]) <= 60


@settings(deadline=None)
@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50),
    fraction=st.floats(1e-9, 1, exclude_max=True),
)
def test_neither_side_of_the_split_is_empty(keys, fraction):
    is_val = writing.split(np.array(keys, dtype=np.uint64), fraction)
    assert is_val.any() and not is_val.all()
    if 0 < (below := sum(k < int(fraction * 2**64) for k in keys)) < len(keys):
        assert is_val.sum() == below


def test_a_single_document_loses_its_tail_to_validation_and_says_so(tmp_path, capfd):
    text = "0123456789é" * 100
    (tmp_path / "a.txt").write_text(text)
    config = text_config(tmp_path / "a.txt", tmp_path / "cache", val_fraction=0.25)
    for _ in range(2):  # prepared, then mapped
        built = build_corpus(config)
        (head,), (tail,) = byte_documents(built.train), byte_documents(built.val)
        assert (head + tail).decode() == head.decode() + tail.decode() == text
        assert len(tail) == pytest.approx(0.25 * 1200, abs=3)
        assert "one document: its last 25.0 % are held out" in capfd.readouterr().err
    build_corpus(config, rank=1)
    assert not capfd.readouterr().err


def test_the_fingerprint_follows_the_content_not_the_place_or_the_date(tmp_path):
    write_texts(tmp_path / "texts")
    first = build_corpus(text_config(tmp_path / "texts", tmp_path / "cache"))
    shutil.copytree(tmp_path / "texts", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "part0" / "00.txt", ns=(1, 1))
    moved = build_corpus(text_config(tmp_path / "moved", tmp_path / "other"))
    assert moved.fingerprint == first.fingerprint
    assert first.train.fingerprint != first.val.fingerprint
    (tmp_path / "moved" / "part0" / "00.txt").write_text("changed")
    changed = build_corpus(text_config(tmp_path / "moved", tmp_path / "other"))
    assert changed.fingerprint != first.fingerprint


def test_the_unigram_baseline_by_hand(tmp_path):
    write_texts(tmp_path / "texts")
    built = build_corpus(text_config(tmp_path / "texts", tmp_path / "cache"))
    counts = Counter(t for d in documents(built.train) for t in d[1:])
    total = sum(counts.values())
    bits, size = 0.0, 0
    for document in documents(built.val):
        size += len(document) - 1
        bits += sum(-math.log2((counts[t] + 1) / (total + 257)) for t in document[1:])
    assert unigram_bits_per_byte(built) == pytest.approx(bits / size)
    assert 0 < unigram_bits_per_byte(built) < 8


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    seed=st.integers(0, 100),
    chunk=st.integers(1, 30),
)
@settings(deadline=None)
def test_targets_are_counted_alike_however_the_file_is_cut(lengths, seed, chunk):
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 5, offsets[-1]).astype(np.uint16)
    is_val = rng.random(len(lengths)) < 0.5
    expected = np.zeros((2, 5), dtype=np.int64)
    for i, side in enumerate(is_val):
        for token in tokens[offsets[i] + 1 : offsets[i + 1]]:
            expected[int(side), token] += 1
    found = writing.count_targets(tokens, offsets, is_val, 5, chunk=chunk)
    assert (found == expected).all()


def test_the_standard_library_trains_out_of_the_box(tmp_path, monkeypatch):
    real = corpus.list_files
    monkeypatch.setattr(corpus, "list_files", lambda kind, path: real(kind, path)[::8])  # for speed
    built = build_corpus(DataConfig(cache_dir=str(tmp_path), val_fraction=0.1))
    assert built.train.num_tokens > 100_000 and built.val.num_documents > 1
    assert 4 < unigram_bits_per_byte(built) < 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "web"}, ["'web'", "one of stdlib, text", "use kind=text"]),
        ({"kind": "text"}, ["path is not set", "set it"]),
        ({"path": "x"}, ["'x'", "kind 'stdlib'", "use kind=text"]),
        ({"seq_len": 1}, ["seq_len is 1", "at least 2", "raise it"]),
        ({"val_fraction": 0.0}, ["val_fraction is 0.0", "strictly between 0 and 1", "0.05"]),
        ({"val_fraction": 1.0}, ["val_fraction is 1.0", "strictly between 0 and 1"]),
        ({"seed": -1}, ["seed is -1", "not be negative"]),
    ],
)
def test_a_bad_configuration_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        DataConfig(**changes)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match=r"holds no text in its 1 files; give a path"):
        build_corpus(text_config(tmp_path / "a.jsonl", tmp_path / "cache"))


def test_too_little_text_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["abcd", "efgh"])
    config = text_config(tmp_path / "a.jsonl", tmp_path / "cache", seq_len=6)
    with pytest.raises(ValueError, match=r"has 5 tokens but seq_len is 6; .* lower seq_len"):
        build_corpus(config)
    config.seq_len = 5
    assert build_corpus(config).train.num_tokens == 5
    (tmp_path / "b.txt").write_text("é")  # cannot be cut in two
    with pytest.raises(ValueError, match=r"fewer than two parts that are not empty.*give more"):
        build_corpus(text_config(tmp_path / "b.txt", tmp_path / "cache"))


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    config = text_config(tmp_path / "texts", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr("cp_gdn.train.data.tokenizer.ByteTokenizer.vocab_size", 105)
        with pytest.raises(ValueError, match=r"00\.txt has the token id 117 .* is 105; ids must"):
            build_corpus(config)
