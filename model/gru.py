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
        hidden = h0_SH.shape[1]
        weight_HG = weight_GH.t()
        rz_NR = i_NG.new_empty(len(i_NG), 2 * hidden)
        n_NH, recurrent_n_NH, h_NH, before_NH = i_NG.new_empty(4, len(i_NG), hidden).unbind()
        h_SH, finished, first = h0_SH, [], 0
        for b in batch_sizes:
            if b < len(h_SH):  # segments end from the last one on
                finished.append(h_SH[b:])
                h_SH = h_SH[:b]
            rows = slice(first, first + b)
            gates_SG = torch.addmm(bias_G, h_SH, weight_HG)
            rz_SR = torch.add(i_NG[rows, : 2 * hidden], gates_SG[:, : 2 * hidden])
            rz_SR = torch.sigmoid(rz_SR, out=rz_NR[rows])
            r_SH, z_SH = rz_SR[:, :hidden], rz_SR[:, hidden:]
            recurrent_n_NH[rows] = gates_SG[:, 2 * hidden :]
            n_SH = torch.addcmul(i_NG[rows, 2 * hidden :], r_SH, gates_SG[:, 2 * hidden :])
            n_SH = torch.tanh(n_SH, out=n_NH[rows])
            before_NH[rows] = h_SH
            h_SH = torch.lerp(n_SH, h_SH, z_SH, out=h_NH[rows])
            first += b
        last_SH = torch.cat([h_SH, *reversed(finished)])
        ctx.batch_sizes = batch_sizes
        ctx.save_for_backward(rz_NR, n_NH, recurrent_n_NH, before_NH, weight_GH)
        return h_NH, last_SH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h_NH: Tensor, grad_last_SH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rz_NR, n_NH, recurrent_n_NH, before_NH, weight_GH = ctx.saved_tensors
        hidden = n_NH.shape[1]
        r_NH, z_NH = rz_NR[:, :hidden], rz_NR[:, hidden:]
        # What a state's gradient is multiplied with on its way to each gate, all steps at once.
        to_n_NH = (1.0 - z_NH) * (1.0 - n_NH * n_NH)
        to_z_NH = (before_NH - n_NH) * z_NH * (1.0 - z_NH)
        to_r_NH = to_n_NH * recurrent_n_NH * r_NH * (1.0 - r_NH)
        to_recurrent_n_NH = to_n_NH * r_NH
        factor_NGH = torch.stack([to_r_NH, to_z_NH, to_recurrent_n_NH], dim=1)
        grad_NGH = torch.empty_like(factor_NGH)  # with respect to W h + b
        state_NH = torch.empty_like(n_NH)  # with respect to h'
        end, carried_SH = len(n_NH), grad_last_SH[: ctx.batch_sizes[-1]]
        for step in range(len(ctx.batch_sizes) - 1, -1, -1):
            b = ctx.batch_sizes[step]
            if b > len(carried_SH):  # segments whose last step this is
                carried_SH = torch.cat([carried_SH, grad_last_SH[len(carried_SH) : b]])
            rows = slice(end - b, end)
            g_SH = torch.add(carried_SH, grad_h_NH[rows], out=state_NH[rows])
            gates_SGH = torch.mul(factor_NGH[rows], g_SH[:, None], out=grad_NGH[rows])
            carried_SH = torch.addmm(g_SH * z_NH[rows], gates_SGH.flatten(1), weight_GH)
            end -= b
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
