"""HybridLM: the same loss and gradients on one rank and on several, and transformers' Qwen3.5."""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

import cp_gdn
from cp_gdn import boundary, comm
from cp_gdn.layers import lm_head
from cp_gdn.models.hybrid import HybridLM
from cp_gdn.ops.recompute import States, states
from tests.distributed import run_ranks
from tests.layers.common import in_float64, parameter_gradients, relative, total, worst
from tests.models.common import TINY

T = 150
PACKED = (0, 50, 51, 140, T)  # ends on a cut, is one token long, spans three ranks
SIZES = (50, 30, 70)
EXCHANGES = ("exchange_states", "exchange_gradients", "exchange_halo", "return_halo")
EXCHANGES += ("swap", "sum_parts", "send_state", "receive_state")


def home(name):
    """The module that an exchange is called through."""
    return comm if name in ("swap", "sum_parts") else boundary


def slow_decay(model: torch.nn.Module) -> None:
    """The first head of every Gated DeltaNet layer decays by about 1e-4 a token, the second not."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p[0], p[1] = -9.2, -200.0


def make_model(dtype: torch.dtype = torch.float64) -> HybridLM:
    torch.manual_seed(0)
    model = HybridLM(TINY).to(dtype)
    slow_decay(model)
    return model


def tokens(B: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and shifted labels, every seventh without a target."""
    ids = torch.randint(0, TINY.vocab_size, (B, T + 1))
    labels = ids[:, 1:].clone()
    labels[:, ::7] = -100
    return ids[:, :-1], labels


def run(model, ids, labels, context):
    """Loss sum, number of targets, parameter gradients of this rank."""
    model.zero_grad()
    out = model(context.shard(ids), context.shard(labels), cp_context=context)
    assert out.logits is None and out.loss_sum.ndim == out.num_valid.ndim == 0
    out.loss_sum.backward()
    return out.loss_sum.detach(), out.num_valid, parameter_gradients(model)


def one_rank(model, ids, labels, cu_seqlens=None):
    return run(model, ids, labels, cp_gdn.build_cp_context(seq_len=T, cu_seqlens=cu_seqlens))


def on_ranks(model, ids, labels, cu_seqlens=None, exchange="auto", sizes=SIZES, patches=()):
    """The same summed over the ranks."""

    def rank_main(rank, size):
        context = cp_gdn.build_cp_context(
            dist.group.WORLD,
            seq_len=T,
            cu_seqlens=cu_seqlens,
            shard_sizes=sizes,
            exchange=exchange,
        )
        with ExitStack() as stack:
            for name, replacement in patches:
                stack.enter_context(patch.object(home(name), name, replacement))
            return run(model, ids, labels, context)

    outs = run_ranks(len(sizes), rank_main)
    return sum(o[0] for o in outs), sum(o[1] for o in outs), total([o[2] for o in outs])


def error(ours, theirs) -> tuple[float, str]:
    assert ours[1] == theirs[1]
    return max((relative(ours[0], theirs[0]), "loss"), worst(ours[2], theirs[2]))


@pytest.mark.parametrize(("B", "cu_seqlens"), [(1, PACKED), (1, None), (2, None)])
@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "all_gather", "serial"])
def test_three_ranks_equal_one(exchange, B, cu_seqlens):
    model = make_model()
    ids, labels = tokens(B)
    expected = one_rank(model, ids, labels, cu_seqlens)
    assert expected[1] == (labels != -100).sum()
    found = error(on_ranks(model, ids, labels, cu_seqlens, exchange), expected)
    assert found < (1e-10, ""), found


def test_three_ranks_equal_one_in_fp32():
    model = make_model(torch.float32)
    ids, labels = tokens()
    expected = one_rank(model, ids, labels, PACKED)
    found = error(on_ranks(model, ids, labels, PACKED), expected)
    assert found < (1e-5, ""), found


def test_a_rank_without_targets_takes_part():
    model = make_model()
    ids, labels = tokens()
    labels[:, SIZES[0] :] = -100
    expected = one_rank(model, ids, labels)
    found = error(on_ranks(model, ids, labels), expected)
    assert found < (1e-10, ""), found


sum_parts = comm.sum_parts
MUTATIONS = {
    "states are zeros": (
        "exchange_states",
        lambda summary, _: (torch.zeros_like(summary.S), boundary.Transitions()),
    ),
    "gradients of states are zeros": ("exchange_gradients", lambda dS, *_: torch.zeros_like(dS)),
    "halo is zeros": ("exchange_halo", lambda x, _, n: x.new_zeros(x.shape[0], n, x.shape[2])),
    "gradient of the halo is dropped": ("return_halo", lambda *_: []),
    "gradients of keys and values are not summed": (
        "sum_parts",
        lambda parts, rows: sum_parts([p for p in parts if p[0] == dist.get_rank()], rows),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees_a_broken_exchange(name):
    model = make_model()
    ids, labels = tokens()
    expected = one_rank(model, ids, labels, PACKED)
    broken = on_ranks(model, ids, labels, PACKED, "ring", patches=[MUTATIONS[name]])
    found = error(broken, expected)
    assert found > (1e-4, ""), found


@pytest.mark.parametrize("exchange", ["all_gather", "serial"])
def test_activation_checkpointing_changes_nothing(exchange):
    model = make_model(torch.float32)
    ids, labels = tokens()
    plain = on_ranks(model, ids, labels, PACKED, exchange)
    model.set_activation_checkpointing(True)
    again = on_ranks(model, ids, labels, PACKED, exchange)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[2][name], again[2][name]) for name in plain[2])


def test_recomputation_calls_collectives_in_the_same_order_on_all_ranks():
    """Two ranks, one layer after the other: forward once more, then its backward."""
    model = make_model(torch.float32)
    ids, labels = tokens()

    def calls(checkpointing: bool) -> list[list[str]]:
        def rank_main(rank, size):
            seen = []

            def recorded(name, function):
                def call(*args, **kwargs):
                    seen.append(name)
                    return function(*args, **kwargs)

                return call

            model.set_activation_checkpointing(checkpointing)
            context = cp_gdn.build_cp_context(
                dist.group.WORLD,
                seq_len=T,
                cu_seqlens=PACKED,
                shard_sizes=(60, 90),
                exchange="all_gather",
            )
            with ExitStack() as stack:
                for name in EXCHANGES:
                    function = recorded(name, getattr(home(name), name))
                    stack.enter_context(patch.object(home(name), name, function))
                run(model, ids, labels, context)
            return seen

        return run_ranks(2, rank_main)

    delta_forward, delta_backward = EXCHANGES[2::-2], EXCHANGES[1::2][:2]
    softmax_forward = ("swap", "swap")
    # of keys and of values: the runs of queries, then the ranks
    softmax_backward = ("swap", "sum_parts", "sum_parts", "swap", "sum_parts", "sum_parts")
    forward = 3 * delta_forward + softmax_forward
    plain, again = calls(False), calls(True)
    assert plain[0] == plain[1] == [*forward, *softmax_backward, *3 * delta_backward]
    layers = softmax_forward + softmax_backward + 3 * (delta_forward + delta_backward)
    assert again[0] == again[1] == [*forward, *layers]


def test_only_the_second_forward_of_a_layer_keeps_states():
    model = make_model(torch.float32)
    model.set_activation_checkpointing(True)
    ids, labels = tokens()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(states()))
    model(ids, labels).loss_sum.backward()
    assert seen == 4 * [States.PROMISED] + 4 * [States.KEPT]
    assert states() is States.NONE


def test_activation_checkpointing_saves_memory():
    model = make_model(torch.float32)
    ids, labels = tokens()

    def saved() -> int:
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(ids, labels)
        return sum(kept.values())

    everything = saved()
    model.set_activation_checkpointing(True)
    assert saved() < everything / 4


def test_the_loss_is_made_in_slices():
    """Slices add to the loss of all logits, and no slice outlives its turn."""
    model = make_model()
    ids, labels = tokens(2)
    whole = one_rank(model, ids, labels)
    rows = []
    linear = F.linear

    def spy(x, weight, *args):
        if weight is model.lm_head.weight:
            rows.append(x.shape[0])
        return linear(x, weight, *args)

    with patch.object(lm_head, "SLICE", 64), patch.object(F, "linear", spy):
        sliced = one_rank(model, ids, labels)
    assert error(sliced, whole) < (1e-12, "")
    assert rows[:5] == [64, 64, 64, 64, 44] and sorted(rows[5:]) == sorted(rows[:5])

    logits = model(ids).logits
    direct = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert relative(whole[0], direct) < 1e-12


def transformers_model(tied: bool) -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_attention_heads,
        num_key_value_heads=TINY.num_key_value_heads,
        head_dim=TINY.head_dim,
        linear_num_key_heads=TINY.linear_num_key_heads,
        linear_num_value_heads=TINY.linear_num_value_heads,
        linear_key_head_dim=TINY.linear_key_head_dim,
        linear_value_head_dim=TINY.linear_value_head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": TINY.rope_theta,
            "partial_rotary_factor": TINY.partial_rotary_factor,
        },
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = Qwen3_5ForCausalLM(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    slow_decay(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tied):
    """Qwen3_5ForCausalLM: same state dict, logits, loss, gradients, on one rank and three."""
    torch.manual_seed(1)
    ids, labels = tokens(2)
    with in_float64():
        hf = transformers_model(tied).double()
        logits = hf(ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    theirs = (loss.detach(), (labels != -100).sum(), parameter_gradients(hf))

    model = HybridLM(replace(TINY, tie_word_embeddings=tied)).double()
    model.load_state_dict(hf.state_dict())
    assert relative(model(ids).logits, logits) < 1e-10
    for ours in (one_rank(model, ids, labels), on_ranks(model, ids, labels)):
        found = error(ours, theirs)
        assert found < (1e-10, ""), found
    low = model.float()(ids).logits
    assert relative(low, hf.float()(ids, use_cache=False).logits) < 1e-5


def test_cast_leaves_decay_in_fp32():
    model = make_model(torch.float32).cast(torch.bfloat16)
    for name, p in model.named_parameters():
        decay = name.endswith(("A_log", "dt_bias"))
        assert p.dtype == (torch.float32 if decay else torch.bfloat16), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids, labels = tokens()
    low = one_rank(model, ids, labels, PACKED)
    assert low[0].dtype == torch.float32
    found = error(low, one_rank(make_model(torch.float32), ids, labels, PACKED))
    assert found < (0.2, ""), found
    with pytest.raises(ValueError, match=r"cannot cast a model to torch\.int32"):
        model.cast(torch.int32)


def test_bad_arguments_are_refused():
    for change, message in (
        ({"num_layers": 0}, "num_layers is 0; it must be positive"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads must be a multiple of"),
        ({"partial_rotary_factor": 0.2}, "turns 3 features"),
        ({"partial_rotary_factor": 1.5}, "must be at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    model = make_model(torch.float32)
    ids, labels = tokens()
    with pytest.raises(ValueError, match="expected"):
        model(ids, labels[:, 1:])
    with pytest.raises(ValueError, match="got 150 tokens but the context gives rank 0 100 of 100"):
        model(ids, cp_context=cp_gdn.build_cp_context(seq_len=100))
