"""Layers under torch.compile: their exchanges stay out of its graphs and they compute what they do without it."""

import torch
import torch.distributed as dist

from cp_gdn import CPGatedDeltaNet, build_cp_context
from cp_gdn.layers.attention import CPAttention

from .distributed import run_ranks


def _results(layer, module, context, x):
    x = x.clone().requires_grad_()
    y = context.gather(layer(context.shard(x), cp_context=context))
    return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


def _compiled_and_not(rank, size):
    torch.manual_seed(0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    context = build_cp_context(dist.group.WORLD, seq_len=150, cu_seqlens=[0, 40, 150])
    x = torch.randn(1, 150, 16)
    pairs = []
    for module in (CPGatedDeltaNet(16, 2, 4, 8, 6), CPAttention(16, 2, 1, 8)):
        layer = torch.compile(module, backend=backend)
        pairs.append([_results(f, module, context, x) for f in (layer, module)])
    return pairs, len(graphs)


def test_compiled_layers_over_ranks_are_the_layers():
    for pairs, graphs in run_ranks(2, _compiled_and_not):
        assert graphs >= 4  # what lies around the exchanges is compiled
        for compiled, plain in pairs:
            for a, b in zip(compiled, plain, strict=True):
                assert torch.equal(a, b)
