"""The written-out GRU equals `torch.nn.GRU`, values and gradients."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from model import gru


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    block=st.sampled_from([1, 5, 1000]),
)
def test_values_and_gradients_equal_those_of_torch(lengths, seed, block):
    with mock.patch.object(gru, "BLOCK", block):
        _compare(lengths, seed)


def _compare(lengths, seed):
    torch.manual_seed(seed)
    lengths = sorted(lengths, reverse=True)
    batch_size = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    reference = nn.GRU(4, 5).double()
    x = torch.randn(sum(lengths), 4, dtype=torch.double, requires_grad=True)
    h0 = torch.randn(len(lengths), 5, dtype=torch.double, requires_grad=True)
    out_weight, last_weight = torch.randn(sum(lengths), 5), torch.randn(len(lengths), 5)

    def gradients(h, last):
        loss = (h * out_weight).sum() + (last * last_weight).sum()
        return torch.autograd.grad(loss, [x, h0, *reference.parameters()])

    packed, last = reference(PackedSequence(x, batch_size), h0[None])
    wanted = (packed.data, last[0], *gradients(packed.data, last[0]))
    i = nn.functional.linear(x, reference.weight_ih_l0, reference.bias_ih_l0)
    h, last = gru.scan(i, h0, reference.weight_hh_l0, reference.bias_hh_l0, batch_size)
    got = (h, last, *gradients(h, last))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
