"""Processes that prepare the same corpus at once, and processes that die while they do."""

import json
import multiprocessing as mp
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cp_gdn.train.data import build_corpus, cache, writing
from tests.train.data.helpers import byte_documents, forked, text_config, write_texts

FILES = ["counts.npy", "is_val.npy", "meta.json", "offsets.npy", "tokens.bin"]


@pytest.fixture
def corpus_dir(tmp_path):
    write_texts(tmp_path / "texts")
    return tmp_path / "texts"


def finished(cache_dir: Path) -> list[Path]:
    return [p for p in cache_dir.iterdir() if p.is_dir() and p.suffix != ".partial"]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def mark_writers(monkeypatch, marks: Path, *, patience_s: float):
    """Each process that goes to write leaves a mark, then waits a while for another to come in."""
    real = cache._write_and_rename
    marks.mkdir()

    def write(*args):
        (marks / str(os.getpid())).touch()
        deadline = time.monotonic() + patience_s
        while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        real(*args)

    monkeypatch.setattr(cache, "_write_and_rename", write)


def prepare_at_once(corpus_dir: Path, cache_dir: Path, count: int = 6) -> list:
    def prepare(rank: int):
        corpus = build_corpus(text_config(corpus_dir, cache_dir), rank=rank)
        return corpus.fingerprint, byte_documents(corpus.train), byte_documents(corpus.val)

    return forked(count, prepare)


def test_processes_at_once_prepare_one_cache(corpus_dir, tmp_path, monkeypatch, capfd):
    mark_writers(monkeypatch, tmp_path / "marks", patience_s=0.3)
    results = prepare_at_once(corpus_dir, tmp_path / "cache")
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert all(result == results[0] for result in results)
    assert results[0][1] and results[0][2]
    (folder,) = finished(tmp_path / "cache")
    assert sorted(content(folder)) == FILES
    assert not list((tmp_path / "cache").glob("*.partial"))
    told = capfd.readouterr().err
    assert told.count("tokenised 12 documents") == 1
    assert told.count("waiting for another process") <= 1  # rank 0, unless it is the one at work


def test_without_the_lock_the_test_above_fails(corpus_dir, tmp_path, monkeypatch):
    @contextmanager
    def unlocked(path, *, on_wait):
        yield True

    monkeypatch.setattr(cache, "_locked", unlocked)
    mark_writers(monkeypatch, tmp_path / "marks", patience_s=20)
    prepare_at_once(corpus_dir, tmp_path / "cache")
    assert len(list((tmp_path / "marks").iterdir())) > 1


def test_processes_at_once_fail_alike_and_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    mark_writers(monkeypatch, tmp_path / "marks", patience_s=0.3)
    errors = prepare_at_once(tmp_path / "a.jsonl", tmp_path / "cache", count=3)
    assert {type(e) for e in errors} == {ValueError}
    assert {str(e) for e in errors} == {
        "a.jsonl line 3 has int in 'text' but a document is a string; set text_key to a field of "
        "text, or take the record out"
    }
    assert len(list((tmp_path / "marks").iterdir())) == 3
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def kill_self(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_preparing(corpus_dir: Path, cache_dir: Path) -> None:
    process = mp.get_context("fork").Process(
        target=lambda: build_corpus(text_config(corpus_dir, cache_dir))
    )
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["mid tokens", "before meta", "before rename"])
def test_a_killed_writer_leaves_nothing_that_counts(corpus_dir, tmp_path, monkeypatch, moment):
    build_corpus(text_config(corpus_dir, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        if moment == "mid tokens":
            real = writing._Body._append

            def append(self, out, document, ids):
                real(self, out, document, ids)
                out.flush()
                if len(self.sizes) == 5:
                    kill_self()

            patched.setattr(writing._Body, "_append", append)
        elif moment == "before meta":
            patched.setattr(writing.json, "dumps", kill_self)
        else:
            patched.setattr(Path, "rename", kill_self)
        killed_while_preparing(corpus_dir, tmp_path / "cache")
    (partial,) = (tmp_path / "cache").glob("*.partial")
    assert (partial / "tokens.bin").stat().st_size > 0
    assert not finished(tmp_path / "cache")

    build_corpus(text_config(corpus_dir, tmp_path / "cache"))
    (folder,) = finished(tmp_path / "cache")
    (whole,) = finished(tmp_path / "whole")
    assert content(folder) == content(whole)
    assert not partial.exists()


def test_who_waits_takes_over_from_a_killed_writer(corpus_dir, tmp_path, monkeypatch, capfd):
    config = text_config(corpus_dir, tmp_path / "cache")
    context = mp.get_context("fork")
    writing_now = context.Event()

    def stall(self, documents, progress):
        writing_now.set()
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(writing._Body, "write", stall)
        writer = context.Process(target=lambda: build_corpus(config))
        writer.start()
        assert writing_now.wait(20)
    waiter = context.Process(target=lambda: build_corpus(config, rank=0))
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive() and not finished(tmp_path / "cache")
    writer.kill()
    waiter.join(20)
    assert waiter.exitcode == 0
    assert len(finished(tmp_path / "cache")) == 1
    assert "waiting for another process that is preparing the corpus" in capfd.readouterr().err


def test_an_interrupted_writer_cleans_up(corpus_dir, tmp_path, monkeypatch):
    def interrupt(self, documents, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing._Body, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(text_config(corpus_dir, tmp_path / "cache"))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_dead_writers_of_other_corpora_are_removed_and_live_ones_left_alone(corpus_dir, tmp_path):
    cache_dir = tmp_path / "cache"
    for name in ("text-dead", "text-live"):
        (cache_dir / f"{name}.partial").mkdir(parents=True)
    with cache._locked(cache_dir / "text-live.lock", on_wait=None) as free:
        assert free
        build_corpus(text_config(corpus_dir, cache_dir))
    assert [p.stem for p in cache_dir.glob("*.partial")] == ["text-live"]


@pytest.mark.parametrize("damage", ["tokens", "offsets", "meta", "missing"])
def test_a_damaged_cache_is_written_again(corpus_dir, tmp_path, damage):
    config = text_config(corpus_dir, tmp_path / "cache")
    first = build_corpus(config)
    before = first.train.tokens.tolist()
    (folder,) = finished(tmp_path / "cache")
    whole = content(folder)
    if damage == "missing":
        (folder / "is_val.npy").unlink()
    else:
        name = {"tokens": "tokens.bin", "offsets": "offsets.npy", "meta": "meta.json"}[damage]
        (folder / name).write_bytes(whole[name][: len(whole[name]) // 2])
    assert cache.read_cache(folder) is None
    assert build_corpus(config).train.tokens.tolist() == before
    assert content(folder) == whole


def test_a_second_run_maps_what_the_first_wrote(corpus_dir, tmp_path, monkeypatch):
    config = text_config(corpus_dir, tmp_path / "cache")
    first = build_corpus(config)
    monkeypatch.setattr(cache, "write_corpus", kill_self)
    again = build_corpus(text_config(corpus_dir, tmp_path / "cache", seq_len=16, seed=5))
    assert again.fingerprint == first.fingerprint


def test_what_shapes_the_tokens_makes_another_cache(corpus_dir, tmp_path):
    def build(**changes):
        build_corpus(text_config(corpus_dir, tmp_path / "cache", **changes))
        return len(finished(tmp_path / "cache"))

    assert build() == 1
    assert build(val_fraction=0.5) == 2
    assert build(text_key="body") == 3
    changed = corpus_dir / "part0" / "00.txt"
    os.utime(changed, ns=(1, 1))
    assert build() == 4
    changed.write_text("more text than there was")
    os.utime(changed, ns=(1, 1))
    assert build() == 5


def test_a_cache_dir_that_cannot_be_used_is_refused(corpus_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir .*file.* cannot be used .*; give another"):
        build_corpus(text_config(corpus_dir, tmp_path / "file" / "cache"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.np, "save", full)
    with pytest.raises(ValueError, match=r"cannot be used \(No space left on device\)"):
        build_corpus(text_config(corpus_dir, tmp_path / "cache"))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_meta_file_says_what_a_reader_needs(corpus_dir, tmp_path):
    corpus = build_corpus(text_config(corpus_dir, tmp_path / "cache"))
    (folder,) = finished(tmp_path / "cache")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["num_tokens"] == corpus.train.num_tokens + corpus.val.num_tokens
    assert (folder / "tokens.bin").stat().st_size == 2 * meta["num_tokens"]
