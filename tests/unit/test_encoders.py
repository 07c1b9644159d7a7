"""Every encoder: stepping equals encoding at once, however a history is cut."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoders import EncoderKind, HGRUEncoder, TransformerEncoder, build_encoder
from model.sequences import pack

INPUTS, HIDDEN = 5, 8


def _encoder(kind):
    torch.manual_seed(0)
    if kind is EncoderKind.TRANSFORMER:
        encoder = TransformerEncoder(INPUTS, HIDDEN, heads=2, window=4)
        for name, parameter in encoder.named_parameters():
            if name.endswith("position"):
                torch.nn.init.normal_(parameter)
    else:
        encoder = build_encoder(kind, INPUTS, HIDDEN, dropout=0.0)
    if isinstance(encoder.begin_state, torch.nn.Parameter):
        torch.nn.init.normal_(encoder.begin_state)
    return encoder.eval()


def _run(encoder, x, start, state):
    """One history `[T, I]` in one call."""
    return encoder(x, torch.ones(len(x), dtype=torch.int64), start, state)


@pytest.mark.parametrize("kind", list(EncoderKind))
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    seed=st.integers(0, 100),
)
def test_packed_and_cut_encoding_equals_one_history_at_a_time(kind, lengths, cuts, seed):
    encoder = _encoder(kind)
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths, reverse=True)
    x = torch.randn(sum(lengths), INPUTS, generator=generator)
    start = torch.rand(sum(lengths), generator=generator) < 0.3
    offset = np.r_[0, np.cumsum(lengths)]
    batch = pack(offset[:-1], np.array(lengths))
    event = torch.from_numpy(batch.event_N)
    with torch.no_grad():
        packed_h, packed_state = encoder(
            x[event],
            torch.from_numpy(batch.batch_size_T),
            start[event],
            encoder.initial_state(len(lengths)),
        )
        h = torch.empty_like(packed_h)
        h[event] = packed_h
        for s, (first, end) in enumerate(itertools.pairwise(offset)):
            state, at, pieces = encoder.initial_state(1), first, []
            for cut in [*cuts, 100]:
                if at == end:
                    break
                piece = slice(at, min(at + cut, end))
                out, state = _run(encoder, x[piece], start[piece], state)
                pieces.append(out)
                at = piece.stop
            torch.testing.assert_close(torch.cat(pieces), h[first:end], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(state[0], packed_state[s], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(EncoderKind))
def test_no_position_sees_a_later_one(kind):
    encoder = _encoder(kind)
    x, start = torch.randn(6, INPUTS), torch.zeros(6, dtype=torch.bool)
    with torch.no_grad():
        before, _ = _run(encoder, x, start, encoder.initial_state(1))
        x[4] += 1.0
        after, _ = _run(encoder, x, start, encoder.initial_state(1))
    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


def test_the_transformer_forgets_beyond_its_window():
    encoder = TransformerEncoder(INPUTS, HIDDEN, layers=1, heads=2, window=4).eval()
    x, start = torch.randn(8, INPUTS), torch.zeros(8, dtype=torch.bool)
    with torch.no_grad():
        before, _ = _run(encoder, x, start, encoder.initial_state(1))
        x[0] += 1.0
        after, _ = _run(encoder, x, start, encoder.initial_state(1))
    torch.testing.assert_close(before[4:], after[4:])
    assert not torch.allclose(before[3], after[3])


def test_hgru_reruns_the_last_item_from_the_new_session_state():
    encoder = _encoder(EncoderKind.HGRU)
    assert isinstance(encoder, HGRUEncoder)
    x = torch.randn(2, INPUTS)
    with torch.no_grad():
        h, _ = _run(encoder, x, torch.tensor([False, True]), encoder.initial_state(1))
        # By hand: the session GRU reads the state inside the session, gives the next one its
        # start, and the intra-session GRU reads the last item again from there.
        h0, s0 = encoder.initial_state(1).chunk(2, dim=1)
        h1 = encoder.within(x[:1], h0)
        s1 = encoder.across(h1, s0)
        h2 = encoder.within(x[1:], torch.tanh(encoder.start(s1)))
    torch.testing.assert_close(h, torch.cat([h1, h2]))
