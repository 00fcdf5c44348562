"""Causal softmax attention over sharded, packed sequences.

    o_t = sum_{s <= t, same document} softmax_s(scale q_t . k_s) v_s

Every rank computes about the same number of scores: the dearest queries of heavy ranks travel to light ones and their
outputs back (balance.py decides), the gradients of outputs there and those of queries back. A rank gets the keys and
values that the queries it computes see; their gradients are summed where they belong. That is one batch of messages
each way, forward and backward.

A run of queries attends to its document from the document's first token up to the run's own last one: a causal mask
aligned to the lower right corner, which is nowhere stored (flash_attention.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import comm
from ..balance import Plan, plan_for
from ..context import CPContext
from ..eager import untraced
from .flash_attention import attend


@untraced
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cp_context: CPContext | None = None,
) -> Tensor:
    """Causal attention of this rank's queries to their documents; differentiable in q, k, v.

    Args:
        q: [B, T, Hq, D]; under context parallelism T is this rank's part of the sequence.
        k, v: [B, T, Hkv, D], Hq a multiple of Hkv: query head h reads head ``h // (Hq // Hkv)``.
        scale: multiplies the scores; default ``1 / sqrt(D)``.
        cp_context: carries the shards and the documents; None: one rank, one document a row. Every
            rank of its group must call, and backpropagate.

    Returns:
        [B, T, Hq, D].

    Raises:
        ValueError: shapes or dtypes that do not fit, tokens that the context does not expect, B > 1
            with packed documents.
    """
    _check(q, k, v, cp_context)
    if cp_context is None:
        return attend(q, k, v, scale, new_shape=False)
    plan = plan_for(cp_context)
    runs = iter(_HandOut.apply(q, k, v, plan, cp_context))
    packed = cp_context.num_documents > 1
    outputs = [attend(*run, scale, new_shape=packed) for run in zip(runs, runs, runs, strict=True)]
    return _HandBack.apply(plan, cp_context, *outputs)


class _Mail:
    """Messages for one exchange."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.outgoing: list[tuple[int, Tensor]] = []
        self.incoming: list[tuple[int, Tensor]] = []

    def exchange(self, what: str, context: CPContext) -> None:
        """Send everything, and fill what the methods below returned."""
        with comm.operations.named(what):
            comm.swap(self.outgoing, self.incoming, context)

    def hand_out(self, x: Tensor) -> list[Tensor]:
        """From this rank's x [T, B, H, D] to the parts [n, B, H, D] of the runs that it computes."""
        plan, parts = self.plan, []
        for run in plan.runs:
            if run.owner == plan.rank:
                parts.append(x[plan.local(run)])
            else:
                parts.append(x.new_empty(run.size, *x.shape[1:]))
                self.incoming.append((run.owner, parts[-1]))
        self.outgoing += [(run.rank, x[plan.local(run)].contiguous()) for run in plan.given]
        return parts

    def hand_back(self, parts: list[Tensor]) -> Tensor:
        """From the parts of the runs that this rank computed to x [T, B, H, D] of its own tokens."""
        plan = self.plan
        if plan.stays:
            return torch.cat(parts)
        x = parts[0].new_empty(plan.num_tokens, *parts[0].shape[1:])
        for run, part in zip(plan.runs, parts, strict=True):
            if run.owner == plan.rank:
                x[plan.local(run)] = part
            else:
                self.outgoing.append((run.owner, part.contiguous()))
        self.incoming += [(run.rank, x[plan.local(run)]) for run in plan.given]
        return x

    def fetch(self, x: Tensor) -> Tensor:
        """From this rank's x [T, B, H, D], keys or values, to what its runs see; itself where no other rank has any."""
        plan = self.plan
        self.outgoing += [(span.peer, x[plan.local(span)].contiguous()) for span in plan.lent]
        if not plan.fetched:
            return x
        every = x.new_empty(plan.num_keys, *x.shape[1:])
        for span in plan.kept:
            every[plan.rows(span)] = x[plan.local(span)]
        self.incoming += [(span.peer, every[plan.rows(span)]) for span in plan.fetched]
        return every

    def fetch_back(self, parts: list[Tensor]) -> list[tuple[int, slice, Tensor]]:
        """From the gradients [m, B, H, D] of what each run sees to their summands at home, for comm.sum_parts."""
        plan = self.plan
        given = [(plan.rank, plan.seen(run), x) for run, x in zip(plan.runs, parts, strict=True)]
        every = comm.sum_parts(given, plan.num_keys)
        self.outgoing += [(span.peer, every[plan.rows(span)]) for span in plan.fetched]
        summands = [(span.peer, plan.local(span), every[plan.rows(span)]) for span in plan.kept]
        for span in plan.lent:
            part = every.new_empty(span.size, *every.shape[1:])
            self.incoming.append((span.peer, part))
            summands.append((span.peer, plan.local(span), part))
        return summands


def _rows(x: Tensor) -> Tensor:
    """[B, T, H, D] with the tokens in front, [T, B, H, D], or back: a stretch of tokens is one block of memory."""
    return x.transpose(0, 1)


class _HandOut(torch.autograd.Function):
    """From q, k, v of this rank's tokens to those of the runs that it computes: q [B, n, Hq, D] and the m >= n keys and
    values [B, m, Hkv, D] that they see, run by run."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, context: CPContext
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.context = plan, context
        mail = _Mail(plan)
        queries, keys, values = mail.hand_out(_rows(q)), mail.fetch(_rows(k)), mail.fetch(_rows(v))
        mail.exchange("queries, keys and values of attention", context)
        runs = []
        for run, part in zip(plan.runs, queries, strict=True):
            runs += [part, keys[plan.seen(run)], values[plan.seen(run)]]
        return tuple(map(_rows, runs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = list(map(_rows, grads))
        mail = _Mail(ctx.plan)
        dq = mail.hand_back(parts[0::3])
        dk, dv = mail.fetch_back(parts[1::3]), mail.fetch_back(parts[2::3])
        mail.exchange("gradients of queries, keys and values of attention", ctx.context)
        sums = (comm.sum_parts(x, ctx.plan.num_tokens) for x in (dk, dv))
        return _rows(dq), *map(_rows, sums), None, None


class _HandBack(torch.autograd.Function):
    """From the outputs [B, n, Hq, D] of the runs that this rank computed to those of its own tokens, [B, T, Hq, D]."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, context: CPContext, *outputs: Tensor) -> Tensor:
        ctx.plan, ctx.context = plan, context
        mail = _Mail(plan)
        o = mail.hand_back(list(map(_rows, outputs)))
        mail.exchange("outputs of attention", context)
        return _rows(o).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mail = _Mail(ctx.plan)
        parts = mail.hand_out(_rows(grads[0]))
        mail.exchange("gradients of outputs of attention", ctx.context)
        return None, None, *map(_rows, parts)


def _check(q: Tensor, k: Tensor, v: Tensor, context: CPContext | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected "
            "[B, T, Hq, D] and twice [B, T, Hkv, D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads and {k.shape[2]} key heads; Hq must be a multiple of Hkv"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must agree: cast them"
        )
    if context is not None:
        context.check_tokens(q)
