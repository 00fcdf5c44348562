"""A hybrid model small enough for every test."""

from cp_gdn.models.hybrid import HybridConfig

TINY = HybridConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=4,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    rope_theta=1e4,
)
