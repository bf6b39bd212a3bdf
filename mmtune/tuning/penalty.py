"""The conflict penalty of LoRASculpt in closed form, one tile of memory.

For a frozen weight W (p x q) and an update D the penalty is N = ||M * D||_F with the retention mask
M = tanh(omega * |1 / ln(|W| / ||W||_F + 1e-15)|): large weights are taken to carry general knowledge,
and an update that falls on them costs more. With D = B A and G = M^2 * D

    dN/dB = G A^T / N        dN/dA = B^T G / N        N^2 = <B, G A^T>

so one pass over tiles of W gives the value and both gradients, and nothing of size p x q is kept.
The control replaces M^2 by its mean c^2 over the matrix: G = c^2 D, and only r x r products are needed.
Where D = 0 (B before its first step) value and gradients are 0. An all-zero W has M = 0.
Source: Liang et al., LoRASculpt, CVPR 2025, arXiv 2503.16843.
"""

from __future__ import annotations

from typing import Any

import torch

TILE_ENTRIES = 1 << 20


def retention_mask_squared(tile: torch.Tensor, norm: torch.Tensor, omega: float) -> torch.Tensor:
    """M^2 for some rows of W [t, q], given ||W||_F of the whole; 0 where W is all zero."""
    some = norm > 0  # a tensor still: asking for its value would make a GPU wait at every tile
    ratio = tile.abs().div_(torch.where(some, norm, torch.ones_like(norm))).add_(1e-15)
    # At |W| = ||W||_F the logarithm is 0 and M = tanh(inf) = 1, which the formula gives by itself.
    return ratio.log_().reciprocal_().abs_().mul_(omega * some.to(tile.dtype)).tanh_().square_()


def frobenius(weight: torch.Tensor) -> torch.Tensor:
    """||W||_F, fp64: summed in fp32 on a CPU it is 0.3 % off for a 4096 x 11008 matrix."""
    tiles = weight.detach().split(_rows(weight))
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tile, dtype=torch.float64) for tile in tiles])
    )


def mean_square_mask(weight: torch.Tensor, omega: float = 1.0) -> torch.Tensor:
    """c^2, the mean of M^2 over a weight (p x q), summed in fp64."""
    dtype = _precision(weight)
    norm = frobenius(weight).to(dtype)
    tiles = weight.detach().split(_rows(weight))
    sums = [
        retention_mask_squared(t.to(dtype, copy=True), norm, omega).sum(dtype=torch.float64) for t in tiles
    ]
    return torch.stack(sums).sum() / weight.numel()


class RetentionMask:
    """M of one frozen weight (p x q), tile by tile, with what is known of the whole.

    shape: (p, q).
    """

    def __init__(self, weight: torch.Tensor, omega: float = 1.0, norm: torch.Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.shape = weight.shape
        self.omega = omega
        self.norm = frobenius(weight) if norm is None else norm

    def squared(self, rows: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """M^2 of some rows [t, q]."""
        tile = self.weight[rows].to(dtype, copy=True)
        return retention_mask_squared(tile, self.norm.to(dtype), self.omega)

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B^T G [r x q], G A^T [p x r]) with G = M^2 * (B A), for a (r x q) and b (p x r); no autograd."""
        b_g, g_a = torch.zeros_like(a), torch.empty_like(b)
        rows = _rows(self.weight)
        for start in range(0, self.shape[0], rows):
            part = slice(start, start + rows)
            g = self.squared(part, a.dtype).mul_(b[part] @ a)
            g_a[part] = g @ a.T
            b_g.addmm_(b[part].T, g)
        return b_g, g_a


class ConstantMask(RetentionMask):
    """The control: M^2 is c^2, its mean over the weight, everywhere; only r x r products are needed."""

    def __init__(self, weight: torch.Tensor, omega: float = 1.0) -> None:
        self.shape = weight.shape
        self.square = mean_square_mask(weight, omega)

    def squared(self, rows: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.square.to(dtype).expand(self.shape)[rows]

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        square = self.square.to(a.dtype)
        return square * (b.T @ b) @ a, square * b @ (a @ a.T)


def retention_mask(weight: torch.Tensor, omega: float = 1.0, constant: bool = False) -> RetentionMask:
    """The mask of a frozen weight, to be made once and kept."""
    return (ConstantMask if constant else RetentionMask)(weight, omega)


def update_penalty(
    mask: RetentionMask, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N = ||M * (B A)||_F and its gradients for A (r x q) and B (p x r), as plain tensors; all 0 at N = 0.

    Computed in fp32, or fp64 where the adapter is.
    """
    dtype = _precision(lora_a)
    # Under autocast the products would be bf16, in which most of this penalty's gradient is lost.
    with torch.no_grad(), torch.autocast(lora_a.device.type, enabled=False):
        a, b = lora_a.detach().to(dtype), lora_b.detach().to(dtype)
        b_g, g_a = mask.products(a, b)
        value = (b * g_a).sum().clamp_min(0).sqrt()
        scale = torch.where(value > 0, 1 / value, torch.zeros_like(value))
        return value, b_g * scale, g_a * scale


def conflict_penalty(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, omega: float = 1.0
) -> torch.Tensor:
    """||M * (B A)||_F as a scalar with gradients for lora_a and lora_b.

    weight: frozen, p x q, any float type. lora_a: r x q. lora_b: p x r.
    """
    return _OfUpdate.apply(lora_a, lora_b, retention_mask(weight, omega))


class _OfUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, mask: RetentionMask) -> torch.Tensor:
        value, grad_a, grad_b = update_penalty(mask, a, b)
        ctx.save_for_backward(grad_a.to(a.dtype), grad_b.to(b.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_a, grad_b = ctx.saved_tensors
        return grad * grad_a, grad * grad_b, None


def drift_penalty(
    weight: torch.Tensor, initial: torch.Tensor, omega: float = 1.0, constant: bool = False
) -> torch.Tensor:
    """||M0 * (W - W0)||_F for a weight that trains in full, M0 from its initial value W0; 0 at W = W0.

    weight, initial: p x q. constant: M0^2 is replaced by its mean, the control. dN/dW = M0^2 * (W - W0) / N.
    """
    return _Drift.apply(weight, initial, omega, constant)


class _Drift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, initial: torch.Tensor, omega: float, constant: bool
    ) -> torch.Tensor:
        dtype = _precision(weight)
        drift = weight.detach().to(dtype) - initial.to(dtype)
        if constant:
            g = drift * mean_square_mask(initial, omega).to(dtype)
        else:
            norm = frobenius(initial).to(dtype)
            g = retention_mask_squared(initial.to(dtype, copy=True), norm, omega).mul_(drift)
        value = (g * drift).sum().clamp_min(0).sqrt()
        scale = torch.where(value > 0, 1 / value, torch.zeros_like(value))
        ctx.save_for_backward((g * scale).to(weight.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None, None


def _rows(weight: torch.Tensor) -> int:
    """How many rows make a tile."""
    return max(1, TILE_ENTRIES // weight.shape[1])


def _precision(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
