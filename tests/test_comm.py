"""What the exchanges send, counted against the formulas, and the collectives that training uses."""

import pytest
import torch
import torch.distributed as dist

from cp_gdn import boundary, build_cp_context, comm
from cp_gdn.metering import Exchange
from cp_gdn.scan import Summary

from .distributed import run_ranks

HV, K, V = 6, 4, 8


def _bytes(rank, size, exchange):
    context = build_cp_context(dist.group.WORLD, seq_len=64 * size, exchange=exchange)
    S = torch.ones(1, HV, K, V)
    M = torch.ones(1, HV, K, K) if context.through(rank) else None
    comm.meter.take()
    _, transitions = boundary.exchange_states(Summary(M, S), context)
    forward = comm.meter.take()["bytes"]
    boundary.exchange_gradients(S, transitions, context)
    return forward, comm.meter.take()["bytes"]


def test_bytes_sent_per_rank():
    state, transition = HV * K * V * 4, HV * K * K * 4
    ring = run_ranks(3, _bytes, "ring")
    assert ring == [(state, 0), (state, state), (0, state)]
    # only the middle rank has an M, and states go to the ranks behind only
    gathered = run_ranks(3, _bytes, "all_gather")
    assert gathered == [(2 * state, 0), (state + 2 * transition, state), (0, 2 * state)]
    # an owner of a third of the heads: sends two thirds of what it has, and S_in of its third to who receives
    two_thirds, third = 2 * state // 3, state // 3
    assert run_ranks(3, _bytes, "all_to_all") == [
        (two_thirds + 2 * third, third),
        (two_thirds + 2 * transition // 3 + third, two_thirds + third),
        (third, two_thirds + 2 * third),
    ]
    # two ranks: nobody is covered whole, so no M travels at all
    assert run_ranks(2, _bytes, "all_gather") == [(state, 0), (0, state)]


def _few_heads(rank, size):
    context = build_cp_context(dist.group.WORLD, seq_len=64 * size, exchange="all_to_all")
    S = torch.full((1, 2, 3, 3), float(rank + 1))
    M = torch.eye(3).expand(1, 2, 3, 3) if context.through(rank) else None
    S_in, _ = boundary.exchange_states(Summary(M, S), context)
    return 0.0 if S_in is None else S_in.unique().item()


def test_more_ranks_than_heads():
    assert run_ranks(4, _few_heads) == [0.0, 1.0, 3.0, 6.0]


def _training_helpers(rank, size):
    total = comm.all_reduce_sum(torch.tensor([float(rank)]))
    most = comm.all_reduce_max(torch.tensor([float(rank)]))
    said = comm.broadcast_object({"from": rank}, src=1)
    comm.barrier()
    return total.item(), most.item(), said, comm.gather_objects(rank * 10)


def test_collectives_of_training():
    assert run_ranks(3, _training_helpers) == [(3.0, 2.0, {"from": 1}, [0, 10, 20])] * 3
    assert comm.gather_objects(5) == [5] and comm.broadcast_object(7) == 7


def _silent_rank(rank, size):
    context = build_cp_context(dist.group.WORLD, seq_len=64 * size)
    if rank == 0:
        return None  # never sends
    boundary.exchange_states(Summary(None, torch.ones(1, 1, 2, 2)), context)


def test_a_missing_rank_ends_the_others():
    with pytest.raises(Exception, match=r"(?i)time|closed|reset|connection"):
        run_ranks(2, _silent_rank, timeout_s=2)


def test_what_does_not_fit_into_a_box_takes_the_other_way_with_all_of_its_peer(monkeypatch):
    monkeypatch.setattr(comm, "CAPACITY", 64)
    a, b, c = torch.zeros(8), torch.zeros(8), torch.zeros(9)  # 32, 32 and 36 bytes
    fitting, large = comm._fitting([(1, a), (2, a), (1, b), (2, c), (0, c)])
    assert {peer: [id(x) for x in xs] for peer, xs in fitting.items()} == {
        1: [id(a), id(b)],
        0: [id(c)],
    }
    assert [(peer, id(x)) for peer, x in large] == [(2, id(a)), (2, id(c))]


def _names(rank, size):
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    context = build_cp_context(pair, seq_len=10)
    names = []

    def begin(nbytes, device, what, stream):
        names.append(what())
        return Exchange(None)

    comm.meter.begin = begin
    peer = 1 - context.rank
    message = [(peer, torch.ones(1))]
    comm.swap(*((message, []) if context.rank == 0 else ([], message)), context)
    return names


def test_an_exchange_is_named_by_ranks_of_the_job():
    assert run_ranks(4, _names)[2:] == [
        ["to ranks [3], from ranks []"],
        ["to ranks [], from ranks [2]"],
    ]


class _OnGPU(Exception):
    pass


def _on_gpu(rank, size):
    """Whether a context goes to the GPU, for every way in which torch describes a group's backends."""

    def current_device():
        raise _OnGPU

    torch.cuda.current_device = current_device
    dist.get_backend = lambda group: "undefined"  # what torch calls one that it was left to choose
    found = {}
    for config in ("cuda:nccl", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo", "cpu:gloo"):
        dist.get_backend_config = lambda group, config=config: config
        try:
            build_cp_context(dist.group.WORLD, seq_len=64)
            found[config] = False
        except _OnGPU:
            found[config] = True
    return found


def test_nccl_is_known_by_what_moves_gpu_tensors():
    assert run_ranks(1, _on_gpu)[0] == {
        "cuda:nccl": True,
        "cpu:gloo,cuda:nccl": True,
        "cpu:gloo,cuda:gloo": False,
        "cpu:gloo": False,
    }
