"""The tilelang engine: calls of the operator on the Hopper kernels of :mod:`cp_gdn.kernels`.

Same calls as the torch engine (chunked.TorchRun). Nothing here reads the device, and TileLang is
imported at the first call that uses it.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import CPContext
from ..scan import Summary, apply
from .chunked import Gradients


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_tilelang() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def obstacle(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    if not q.is_cuda or not _is_hopper(q.device):
        return "it runs on Hopper GPUs (compute capability 9.0)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {q.dtype}"
    if q.shape[3] != 128 or v.shape[3] != 128:
        return f"it takes K = V = 128, not K = {q.shape[3]}, V = {v.shape[3]}"
    if not _has_tilelang():
        return "TileLang is not installed (pip install 'cp-gdn[hopper]')"
    return None


class HopperRun:
    """One call of the operator on the kernels; states [n, Hv, K, V] fp32, sequences as in chunked.TorchRun.

    ``kept`` and ``plan`` are what the forward kernels save for the backward ones.
    """

    kept: tuple[Tensor, ...] = ()
    plan: Any = None

    def __init__(self, inputs: Sequence[Tensor], scale: float, normalize: bool, context: CPContext):
        q, k, v, g, beta = inputs
        self._inputs, self._scale, self._normalize = (q, k, v, g, beta), scale, normalize
        packed = len(context.pieces) > 1
        self._offsets = context.local_offsets.to(q.device) if packed else None
        self._last = context.pieces[-1]
        self.num_sequences = len(context.pieces) if packed else q.shape[0]

    def zero_states(self) -> Tensor:
        q, _, v = self._inputs[:3]
        return q.new_zeros(
            self.num_sequences, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32
        )

    def summarise(self, h0: Tensor, sequences: slice, *, transition: bool) -> Summary:
        """Summary of the sequences that leave: all rows, or the last piece."""
        from ..kernels.forward import chunk_gdn_summary

        tokens = slice(self._last.start, self._last.end)
        leaving = (x[:, tokens] for x in self._inputs[1:])
        M, S = chunk_gdn_summary(*leaving, use_qk_l2norm_in_kernel=self._normalize)
        return Summary(M if transition else None, apply(Summary(M, S), h0))

    def forward(self, h0: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, Hv, V] and final states."""
        from ..kernels.forward import chunk_gdn_forward

        o, states, saved = chunk_gdn_forward(
            *self._inputs,
            scale=self._scale,
            initial_state=h0,
            cu_seqlens=self._offsets,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self._normalize,
        )
        assert states is not None
        self.kept = (
            saved.a, saved.gate, saved.rnorm, saved.states, saved.cu_seqlens, saved.maps, saved.live,
        )  # fmt: skip
        self.plan = saved.plan
        return o, states

    def receive_gradient(self, do: Tensor) -> None:
        """Take the gradient of the outputs, [B, T, Hv, V], before the calls below."""
        from ..kernels.forward import Saved

        self._do = do.to(self._inputs[0].dtype).contiguous()
        self._saved = Saved(*self.kept, plan=self.plan)

    def summarise_reverse(self, dht: Tensor, sequences: slice) -> Tensor:
        """dS_ext: gradient of the initial states of ``sequences``, from ``dht`` as far as it is known."""
        from ..kernels.backward import chunk_gdn_reverse_summary

        dfinal = self.zero_states()
        dfinal[sequences] = dht
        q, k = self._inputs[:2]
        return chunk_gdn_reverse_summary(
            q,
            k,
            self._saved,
            self._do,
            dfinal,
            scale=self._scale,
            use_qk_l2norm_in_kernel=self._normalize,
        )[sequences]

    def backward(self, h0: Tensor, dht: Tensor) -> Gradients:
        from ..kernels.backward import chunk_gdn_backward

        out = chunk_gdn_backward(
            *self._inputs,
            self._saved,
            self._do,
            dht,
            scale=self._scale,
            initial_state=h0,
            use_qk_l2norm_in_kernel=self._normalize,
        )
        return Gradients(*out)
