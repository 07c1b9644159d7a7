"""The recurrent half of a GRU over packed positions, with its gradient written out.

On a CPU, autograd through `torch.nn.GRU` makes a gradient of the recurrent weights at every step
and adds them up; here the steps only carry the state's gradient, and one matrix product over all
positions makes the weights'. Same equations and weight layout (r, z, n) as `torch.nn.GRU`:

    r = σ(i_r + W_r h + b_r), z = σ(i_z + W_z h + b_z), n = tanh(i_n + r ⊙ (W_n h + b_n)),
    h' = (1 − z) ⊙ n + z ⊙ h.

Shapes: N packed positions, S segments, T steps, H hidden, G = 3·H gates.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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
    ) -> tuple[Tensor, Tensor]:
        hidden, sizes = h0_SH.shape[1], batch_sizes
        weight_HG = weight_GH.t()
        gates_NG, rz_NR = torch.empty_like(i_NG), i_NG.new_empty(len(i_NG), 2 * hidden)
        n_NH, h_NH = i_NG.new_empty(2, len(i_NG), hidden).unbind()
        # Views of every step, made at once: in the loop they would cost as much as the arithmetic.
        columns = i_NG.split([2 * hidden, hidden], dim=1), gates_NG.split([2 * hidden, hidden], 1)
        (i_rz, i_n), (g_rz, g_n) = ([part.split(sizes) for part in pair] for pair in columns)
        gates, rz, n, h = (part.split(sizes) for part in (gates_NG, rz_NR, n_NH, h_NH))
        r, z = (part.split(sizes) for part in rz_NR.split(hidden, dim=1))
        h_SH, finished, before = h0_SH, [], []
        for t, b in enumerate(sizes):
            if b < len(h_SH):  # segments end from the last one on
                finished.append(h_SH[b:])
                h_SH = h_SH[:b]
            before.append(h_SH)
            torch.addmm(bias_G, h_SH, weight_HG, out=gates[t])
            torch.add(i_rz[t], g_rz[t], out=rz[t]).sigmoid_()
            torch.addcmul(i_n[t], r[t], g_n[t], out=n[t]).tanh_()
            h_SH = torch.lerp(n[t], h_SH, z[t], out=h[t])
        last_SH = torch.cat([h_SH, *reversed(finished)])
        before_NH = torch.cat(before) if before else h_NH
        ctx.batch_sizes = batch_sizes
        ctx.save_for_backward(rz_NR, n_NH, gates_NG, before_NH, weight_GH)
        return h_NH, last_SH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h_NH: Tensor, grad_last_SH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rz_NR, n_NH, gates_NG, before_NH, weight_GH = ctx.saved_tensors
        hidden, sizes = n_NH.shape[1], ctx.batch_sizes
        recurrent_n_NH = gates_NG[:, 2 * hidden :]
        r_NH, z_NH = rz_NR[:, :hidden], rz_NR[:, hidden:]
        # What a state's gradient is multiplied with on its way to each gate, all steps at once.
        to_n_NH = (1.0 - z_NH) * (1.0 - n_NH * n_NH)
        to_z_NH = (before_NH - n_NH) * z_NH * (1.0 - z_NH)
        to_r_NH = to_n_NH * recurrent_n_NH * r_NH * (1.0 - r_NH)
        to_recurrent_n_NH = to_n_NH * r_NH
        factor_NGH = torch.stack([to_r_NH, to_z_NH, to_recurrent_n_NH], dim=1)
        grad_NGH = torch.empty_like(factor_NGH)  # with respect to W h + b
        state_NH = torch.empty_like(n_NH)  # with respect to h'
        factor, grads = factor_NGH.split(sizes), grad_NGH.split(sizes)
        flat = grad_NGH.flatten(1).split(sizes)
        state, z, grad_h = state_NH.split(sizes), z_NH.split(sizes), grad_h_NH.split(sizes)
        carried_SH = grad_last_SH[: sizes[-1]]
        for t in range(len(sizes) - 1, -1, -1):
            b = sizes[t]
            if b > len(carried_SH):  # segments whose last step this is
                carried_SH = torch.cat([carried_SH, grad_last_SH[len(carried_SH) : b]])
            g_SH = torch.add(carried_SH, grad_h[t], out=state[t])
            torch.mul(factor[t], g_SH[:, None], out=grads[t])
            carried_SH = torch.addmm(g_SH * z[t], flat[t], weight_GH)
        grad_NG = grad_NGH.flatten(1)
        grad_weight_GH = grad_NG.t() @ before_NH
        grad_bias_G = grad_NG.sum(dim=0)
        # i and W h + b enter every gate alike, but for n, where r stands between.
        grad_i_NG = grad_NG.clone()
        torch.mul(state_NH, to_n_NH, out=grad_i_NG[:, 2 * hidden :])
        missing = grad_last_SH[len(carried_SH) :]
        if len(missing):  # segments without any step: their state went through untouched
            carried_SH = torch.cat([carried_SH, missing])
        return grad_i_NG, carried_SH, grad_weight_GH, grad_bias_G, None


def scan(
    i_NG: Tensor, h0_SH: Tensor, weight_GH: Tensor, bias_G: Tensor, batch_size_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        i_NG: W_i·x + b_i of every position, gates r, z, n.
        h0_SH: state before each segment's first position.
        weight_GH, bias_G: recurrent weights, as `weight_hh_l0` and `bias_hh_l0` of `torch.nn.GRU`.
        batch_size_T: how many segments reach each step, descending.

    Returns:
        h of every position `[N, H]`, and of each segment after its last one `[S, H]`.
    """
    h_NH, last_SH = _Scan.apply(i_NG, h0_SH, weight_GH, bias_G, batch_size_T.tolist())  # type: ignore[no-untyped-call]
    return h_NH, last_SH
