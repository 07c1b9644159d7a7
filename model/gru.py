"""The recurrent half of a GRU over packed positions, with its gradient written out.

On a CPU, autograd through `torch.nn.GRU` makes a gradient of the recurrent weights at every step
and adds them up; here the steps only carry the state's gradient, and one matrix product over all
positions makes the weights'. Same equations and weight layout (r, z, n) as `torch.nn.GRU`:

    r = σ(i_r + W_r h + b_r), z = σ(i_z + W_z h + b_z), n = tanh(i_n + r ⊙ (W_n h + b_n)),
    h' = (1 − z) ⊙ n + z ⊙ h.

Shapes: N packed positions, B of a block of steps, S segments, T steps, H hidden, G = 3·H gates.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 1024  # positions whose factors are made at once: they are used while in the cache


class _Scan(Function):
    """(i_NG, h0_SH, weight_GH, bias_G) → (h_NH, last_SH)."""

    @staticmethod
    def forward(
        ctx: Any,
        i_NG: Tensor,
        h0_SH: Tensor,
        weight_GH: Tensor,
        bias_G: Tensor,
        batch_sizes: list[int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        hidden, sizes = h0_SH.shape[1], batch_sizes
        weight_HG = weight_GH.t()
        # What W h is added to in place, so that r and z come out of the product whole.
        gates_NG = i_NG + bias_G
        gates_NG[:, 2 * hidden :] = bias_G[2 * hidden :]
        n_NH, h_NH = i_NG.new_empty(2, len(i_NG), hidden).unbind()
        # Views of every step, made at once: in the loop they would cost as much as the arithmetic.
        gates, n, h = (part.split(sizes) for part in (gates_NG, n_NH, h_NH))
        rz = gates_NG[:, : 2 * hidden].split(sizes)
        r, z, g_n = (p.split(sizes) for p in gates_NG.split(hidden, dim=1))
        i_n = i_NG[:, 2 * hidden :].split(sizes)
        h_SH, finished, before = h0_SH, [], []
        for t, b in enumerate(sizes):
            if b < len(h_SH):  # segments end from the last one on
                finished.append(h_SH[b:])
                h_SH = h_SH[:b]
            before.append(h_SH)
            gates[t].addmm_(h_SH, weight_HG)
            rz[t].sigmoid_()
            torch.addcmul(i_n[t], r[t], g_n[t], out=n[t]).tanh_()
            h_SH = torch.lerp(n[t], h_SH, z[t], out=h[t])
        last_SH = torch.cat([h_SH, *reversed(finished)])
        before_NH = torch.cat(before) if before else h_NH
        ctx.batch_sizes, ctx.dtype = batch_sizes, dtype
        ctx.save_for_backward(gates_NG, n_NH, before_NH, weight_GH)
        return h_NH, last_SH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h_NH: Tensor, grad_last_SH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        gates_NG, n_NH, before_NH, weight_GH = ctx.saved_tensors
        hidden, sizes = n_NH.shape[1], ctx.batch_sizes
        r_NH, z_NH, recurrent_n_NH = gates_NG.split(hidden, dim=1)
        grad_N4H, state_NH = n_NH.new_empty(len(n_NH), 4, hidden), grad_h_NH.clone()
        grad_h0_SH = grad_last_SH.clone()  # right where there was no step: it went through
        grads = grad_N4H.split(sizes)
        to_gates = grad_N4H.flatten(1)[:, : 3 * hidden].split(sizes)
        state, z = state_NH.split(sizes), z_NH.split(sizes)
        state_1 = state_NH[:, None].split(sizes)
        weight_nrz_GH, going_on = weight_GH.roll(hidden, 0), 0
        blocks = _blocks(sizes)
        factor_B4H = n_NH.new_empty(max((len(rows) for _, rows in blocks), default=0), 4, hidden)
        factor: dict[int, Tensor] = {}
        for t in range(len(sizes) - 1, -1, -1):
            b = sizes[t]
            if t not in factor:
                steps, rows = blocks.pop()
                part = slice(rows.start, rows.stop)
                parts = (r_NH, z_NH, n_NH, recurrent_n_NH, before_NH)
                factors = _factors(*(p[part] for p in parts), out_B4H=factor_B4H[: len(rows)])
                factor = dict(
                    zip(steps, factors.split(sizes[steps.start : steps.stop]), strict=True)
                )
            if b > going_on:  # segments whose last step this is
                state[t][going_on:].add_(grad_last_SH[going_on:b])
                going_on = b
            torch.mul(factor[t], state_1[t], out=grads[t])
            before = state[t - 1][:b] if t else grad_h0_SH[:b].zero_()
            before.addcmul_(state[t], z[t]).addmm_(to_gates[t], weight_nrz_GH)
        grad_NG = grad_N4H.flatten(1)
        recurrent_NG = grad_NG[:, : 3 * hidden]  # of n, r, z
        grad_weight_GH = recurrent_NG.to(ctx.dtype).t() @ before_NH.to(ctx.dtype)
        grad_weight_GH = grad_weight_GH.to(weight_GH.dtype).roll(-hidden, 0)
        grad_bias_G = recurrent_NG.sum(dim=0).roll(-hidden)
        return grad_NG[:, hidden:], grad_h0_SH, grad_weight_GH, grad_bias_G, None, None


def _blocks(sizes: list[int]) -> list[tuple[range, range]]:
    """Runs of steps of about `BLOCK` positions, and their positions; a step is never divided."""
    blocks, first, start, stop = [], 0, 0, 0
    for t, b in enumerate(sizes):
        stop += b
        if stop - start >= BLOCK or t == len(sizes) - 1:
            blocks.append((range(first, t + 1), range(start, stop)))
            first, start = t + 1, stop
    return blocks


def _factors(
    r_BH: Tensor,
    z_BH: Tensor,
    n_BH: Tensor,
    recurrent_n_BH: Tensor,
    before_BH: Tensor,
    *,
    out_B4H: Tensor,
) -> Tensor:
    """What a state's gradient is multiplied with on its way to W_n h + b_n and to the inputs of
    r, z and n."""
    to_recurrent, to_r, to_z, to_n = out_B4H.unbind(dim=1)
    torch.addcmul(n_BH.new_ones(()), n_BH, n_BH, value=-1.0, out=to_n)
    to_n.addcmul_(to_n, z_BH, value=-1.0)
    torch.mul(to_n, r_BH, out=to_recurrent)
    torch.mul(to_recurrent, recurrent_n_BH, out=to_r)
    to_r.addcmul_(to_r, r_BH, value=-1.0)
    torch.sub(before_BH, n_BH, out=to_z)
    to_z.mul_(torch.addcmul(z_BH, z_BH, z_BH, value=-1.0))
    return out_B4H


def scan(
    i_NG: Tensor,
    h0_SH: Tensor,
    weight_GH: Tensor,
    bias_G: Tensor,
    batch_size_T: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        i_NG: W_i·x + b_i of every position, gates r, z, n.
        h0_SH: state before each segment's first position.
        weight_GH, bias_G: recurrent weights, as `weight_hh_l0` and `bias_hh_l0` of `torch.nn.GRU`.
        batch_size_T: how many segments reach each step, descending.
        dtype: of the one product that makes the weights' gradient; None: the weights'. The steps
            stay in the weights': a state rounded at every step drifts.

    Returns:
        h of every position `[N, H]`, and of each segment after its last one `[S, H]`.
    """
    sizes, dtype = batch_size_T.tolist(), dtype or weight_GH.dtype
    h_NH, last_SH = _Scan.apply(i_NG, h0_SH, weight_GH, bias_G, sizes, dtype)  # type: ignore[no-untyped-call]
    return h_NH, last_SH
