import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_gdn.train.data import IGNORE_INDEX, Pack, PackLoader, build_corpus, validation_packs
from tests.train.data.helpers import counting_store, documents, text_config, write_texts


def loader(store, *, seq_len=7, dp_rank=0, dp_size=1, seed=0, shuffle=True):
    return PackLoader(
        store, seq_len=seq_len, dp_rank=dp_rank, dp_size=dp_size, seed=seed, shuffle=shuffle
    )


def one_epoch(loader: PackLoader) -> list[Pack]:
    return [loader.next() for _ in range(loader.packs_per_epoch)]


def equal(a: Pack, b: Pack) -> bool:
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and a.cu_seqlens == b.cu_seqlens
    )


def check_pack(pack: Pack, store, seq_len: int) -> list[int]:
    """All that must hold for a pack of a counting store; returns its tokens without padding."""
    ids, labels, cuts = pack.input_ids.tolist(), pack.labels.tolist(), pack.cu_seqlens
    assert pack.input_ids.dtype == pack.labels.dtype == torch.int64
    assert len(ids) == len(labels) == seq_len
    assert cuts[0] == 0 and cuts[-1] == seq_len and list(cuts) == sorted(set(cuts))
    document_of = {
        token: i
        for i, (a, b) in enumerate(zip(store.starts, store.ends, strict=True))
        for token in range(a, b)
    }
    last_tokens = {int(end) - 1 for end in store.ends}
    kept = []
    for begin, end in pairwise(cuts):
        piece, targets = ids[begin:end], labels[begin:end]
        if piece[0] == store.eos_id:  # padding: its own document, at the end, without labels
            assert end == seq_len and set(piece) == {store.eos_id} and set(targets) == {-100}
            continue
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert len({document_of[token] for token in piece}) == 1
        assert targets == [
            IGNORE_INDEX if token in last_tokens else token + 1 for token in piece
        ]  # the true next token even where the pack cuts the document
        kept += piece
    return kept


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    held_out=st.sets(st.integers(1, 11), max_size=4),
    seq_len=st.integers(2, 33),
    dp_size=st.integers(1, 4),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_an_epoch_holds_every_token_once_over_all_ranks(
    lengths, held_out, seq_len, dp_size, seed, shuffle
):
    store = counting_store(lengths, [i not in held_out for i in range(len(lengths))])
    ranks = [
        loader(store, seq_len=seq_len, dp_rank=r, dp_size=dp_size, seed=seed, shuffle=shuffle)
        for r in range(dp_size)
    ]
    wanted = sorted(t for d in documents(store) for t in d)
    for _ in range(2):
        per_rank = [one_epoch(rank) for rank in ranks]
        assert len({len(packs) for packs in per_rank}) == 1
        packs = [pack for packs in per_rank for pack in packs]
        tokens = [t for pack in packs for t in check_pack(pack, store, seq_len)]
        assert sorted(tokens) == wanted  # so the ranks are disjoint and complete
        labels = sum(int((pack.labels != IGNORE_INDEX).sum()) for pack in packs)
        assert labels == store.num_tokens - store.num_documents
        assert len(packs) * seq_len - store.num_tokens < dp_size * seq_len


def test_ranks_share_the_stream_that_one_rank_reads():
    store = counting_store([5, 13, 2, 30, 8, 3])
    alone = one_epoch(loader(store))
    for dp_size in (2, 3, 4):
        ranks = [loader(store, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
        rounds = -(-len(alone) // dp_size)
        shared = [rank.next() for _ in range(rounds) for rank in ranks]
        assert all(equal(a, b) for a, b in zip(alone, shared, strict=False))
        for padding in shared[len(alone) :]:
            assert padding.cu_seqlens == (0, 7) and (padding.labels == IGNORE_INDEX).all()
            assert (padding.input_ids == store.eos_id).all()


def test_a_pack_by_hand():
    store = counting_store([4, 3, 9])
    packs = one_epoch(loader(store, seq_len=6, shuffle=False))
    assert [p.input_ids.tolist() for p in packs] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, store.eos_id, store.eos_id],
    ]
    assert [p.labels.tolist() for p in packs] == [
        [1, 2, 3, -100, 5, 6],
        [-100, 8, 9, 10, 11, 12],
        [13, 14, 15, -100, -100, -100],
    ]
    assert [p.cu_seqlens for p in packs] == [(0, 4, 6), (0, 1, 6), (0, 4, 6)]


def test_cuts_that_fall_on_document_ends_make_no_empty_documents():
    packs = one_epoch(loader(counting_store([4, 4, 8, 2, 2]), seq_len=4, shuffle=False))
    assert [p.cu_seqlens for p in packs] == [(0, 4), (0, 4), (0, 4), (0, 4), (0, 2, 4)]
    assert packs[2].labels.tolist() == [9, 10, 11, 12] and packs[3].labels[-1] == -100


def test_the_order_changes_with_epoch_and_seed_alone():
    store = counting_store(list(range(2, 30)))
    epochs = [one_epoch(x) for x in [loader(store)] for _ in range(3)]
    again, other = one_epoch(loader(store)), one_epoch(loader(store, seed=1))

    def ids(packs):
        return torch.cat([p.input_ids for p in packs]).tolist()

    assert ids(again) == ids(epochs[0])
    distinct = {tuple(ids(packs)) for packs in [*epochs, other]}
    assert len(distinct) == 4  # seed 1, epoch 0 is not seed 0, epoch 1 either
    plain = loader(store, shuffle=False)
    assert ids(one_epoch(plain)) == ids(one_epoch(plain)) == sorted(ids(again))


def test_the_order_is_pinned_for_every_numpy_version():
    store = counting_store([2] * 8)
    firsts = [p.input_ids[0].item() // 2 for p in one_epoch(loader(store, seq_len=2, seed=3))]
    assert firsts == [4, 7, 5, 1, 6, 0, 3, 2]


def test_a_long_document_does_not_fill_steps_in_a_row():
    store = counting_store([400, *[7] * 100])
    places = [i for i, p in enumerate(one_epoch(loader(store))) if p.input_ids[0] < 400]
    assert places != list(range(places[0], places[0] + len(places)))


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_resumed_loader_goes_on_as_if_never_stopped(dp_size):
    store = counting_store([5, 13, 2, 30, 8, 3, 21])
    for rank in range(dp_size):
        whole = loader(store, dp_rank=rank, dp_size=dp_size)
        total = whole.packs_per_epoch * 5 // 2
        states, packs = [], []
        for _ in range(total):
            states.append(whole.state_dict())
            packs.append(whole.next())
        for i, state in enumerate(states):
            resumed = loader(store, dp_rank=rank, dp_size=dp_size)
            resumed.load_state_dict(state)
            rest = [resumed.next() for _ in range(total - i)]
            assert all(equal(a, b) for a, b in zip(rest, packs[i:], strict=True))
            assert resumed.state_dict() == whole.state_dict()


def test_a_used_loader_goes_back_to_a_state():
    store = counting_store([5, 13, 2, 30])
    used = loader(store)
    state, first = used.state_dict(), used.next()
    [used.next() for _ in range(20)]
    used.load_state_dict(state)
    assert equal(used.next(), first)


def test_a_state_of_another_layout_or_corpus_is_refused():
    store = counting_store([5, 13, 2, 30])
    state = loader(store).state_dict()
    assert set(state) == {"epoch", "sample", "seed", "seq_len", "dp_size", "fingerprint"}
    for name, here, there in [
        ("seq_len", 7, 9),
        ("dp_size", 1, 2),
        ("seed", 0, 4),
        ("fingerprint", "'counting'", "other"),
    ]:
        with pytest.raises(ValueError) as error:
            loader(store).load_state_dict({**state, name: there})
        assert f"{name} is {here} but the saved run had {there!r}" in str(error.value)
        assert "resume with the saved values, or start a new run" in str(error.value)
    for damaged in ({"sample": 99}, {"epoch": -1}, {"sample": None}):
        with pytest.raises(ValueError, match=r"cannot resume at epoch .* use an earlier one"):
            loader(store).load_state_dict({**state, **damaged})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1 .* raise it"),
        ({"dp_rank": 2, "dp_size": 2}, r"dp_rank is 2 .* dp_size 2; pass the rank"),
        ({"dp_rank": -1}, "dp_rank is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        loader(counting_store([9]), **changes)


def test_validation_packs_are_the_first_ones_in_order():
    store = counting_store([5, 13, 2, 30, 8, 3])
    every = one_epoch(loader(store, shuffle=False))
    for count in (1, 3, len(every), 100):
        packs = list(validation_packs(store, 7, count))
        assert len(packs) == min(count, len(every))
        assert all(equal(a, b) for a, b in zip(packs, every, strict=False))
    shares = [list(validation_packs(store, 7, 5, dp_rank=r, dp_size=2)) for r in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert all(equal(shares[i % 2][i // 2], every[i]) for i in range(6))


def test_packs_of_a_built_corpus_hold_its_text(tmp_path):
    write_texts(tmp_path / "texts")
    corpus = build_corpus(text_config(tmp_path / "texts", tmp_path / "cache"))
    text = torch.cat([p.input_ids for p in validation_packs(corpus.val, 64, 99)]).tolist()
    wanted = [t for d in documents(corpus.val) for t in d]
    assert text[: len(wanted)] == wanted and set(text[len(wanted) :]) <= {corpus.eos_id}


def test_long_packs_of_many_documents_are_cheap():
    store = counting_store(np.full(200_000, 30))
    source = loader(store, seq_len=262_144)
    source.next()  # shuffles
    started = time.perf_counter()
    for _ in range(10):
        source.next()
    assert (time.perf_counter() - started) / 10 < 0.25  # 5 ms on an idle core
