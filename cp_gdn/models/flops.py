"""Floating-point operations that the training of a hybrid model takes, for its utilisation (MFU).

A multiply and an add are two operations. Recomputation (activation checkpointing, states replayed
in the backward, the summaries of context parallelism) is not counted: the number is a property of
the model, not of an implementation.
"""

from typing import TYPE_CHECKING

from ..layout import CHUNK

if TYPE_CHECKING:
    from .hybrid import HybridConfig


def gated_delta_rule_flops(
    num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int, chunk: int = CHUNK
) -> float:
    """Forward operations a token of the chunked rule, matrix products only.

    Products of one chunk of C tokens, multiply-adds:

        a key head      K K^T, Q K^T          C C K each
        a value head    K S, Q S, K^T Vd      C K V each
                        A (V - K S), P Vd     C C V each

    which is, for one token, Hk key heads and Hv value heads,

        2 [ 2 C K Hk + (3 K V + 2 C V) Hv ]

    With K = V = 128 and C = 64 these are 8 + 2 Hk / Hv products of 64 x 64 x 128 for every chunk
    and value head. The triangular inverse and elementwise work are left out, and the zeros that
    fill up other heads on kernels of 128.
    """
    C, K, V = chunk, head_k_dim, head_v_dim
    return 2.0 * (2 * C * K * num_k_heads + (3 * K * V + 2 * C * V) * num_v_heads)


def causal_attention_flops(num_heads: int, head_dim: int, seq_len: int) -> float:
    """Forward operations a token of causal attention in a document of ``seq_len`` tokens.

    The triangle, not the square: token t meets t + 1 keys and as many values, (seq_len + 1) / 2 on
    average.
    """
    return 2.0 * num_heads * head_dim * (seq_len + 1)


def train_flops_per_token(config: "HybridConfig", seq_len: int) -> float:
    """Forward and backward operations a token, the backward counted as twice the forward.

    Counted in the forward, for one token:

        2 for every weight of the projections (in_proj_*, out_proj, q, k, v, o), of the MLPs and of
        the projection to the vocabulary, tied or not;
        2 W for every channel of the short convolutions;
        the products of the chunked rule and the triangle of causal attention, as above.

    Every product of the forward has two in the backward, one for the gradient of either factor. Not
    counted: the embedding look-up, norms, activations, softmax, loss, optimizer.

    ``seq_len`` is the length of a document in tokens; for packed documents of lengths n_i it is
    their length as an average token sees it, ``sum(n_i^2) / sum(n_i)``.
    """
    D = config.hidden_size
    Hk, K = config.linear_num_key_heads, config.linear_key_head_dim
    Hv, V = config.linear_num_value_heads, config.linear_value_head_dim
    conv_dim = 2 * Hk * K + Hv * V
    delta = 2.0 * D * (conv_dim + Hv * V + 2 * Hv)  # in_proj_qkv, in_proj_z, in_proj_b, in_proj_a
    delta += 2 * config.linear_conv_kernel_dim * conv_dim
    delta += gated_delta_rule_flops(Hk, Hv, K, V)
    delta += 2 * Hv * V * D  # out_proj

    Hq, Hkv, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    softmax = 2.0 * D * head_dim * (3 * Hq + 2 * Hkv)  # queries, gate and output; keys, values
    softmax += causal_attention_flops(Hq, head_dim, seq_len)

    forward = 2.0 * D * config.vocab_size
    for kind in config.layer_types:
        forward += softmax if kind == "full_attention" else delta
        forward += 2 * 3 * D * config.intermediate_size
    return 3 * forward
