"""The loop over chunks of tokens: products with the heads, the rows' losses, products back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from qatapult.kernels.distillation.objective import Objective
from torch import Tensor

#: Bytes that the logits of one chunk may take, for student and teacher together.
_BUDGET = {"cpu": 64 << 20, "cuda": 1280 << 20}


@dataclass
class Totals:
    """Sums over the valid tokens, each `[]` fp32, and gradients where they were asked for."""

    kl: Tensor
    cross_entropy: Tensor
    grad_hidden: Tensor | None
    grad_head: Tensor | None


@dataclass
class Problem:
    """One call's tensors; see `op.distillation_loss` for the shapes. `weight` is 0 for ignored tokens."""

    hidden: Tensor
    head: Tensor
    labels: Tensor | None
    weight: Tensor
    objective: Objective
    want_hidden: bool
    want_head: bool

    @property
    def want_grad(self) -> bool:
        return self.want_hidden or self.want_head


#: (slice of the tokens, logits of the student) → (divergence, cross-entropy) of each token; see `cpu.divergence_rows_`.
RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def chunk_size(tokens: int, vocabulary: int, element_size: int, device: torch.device) -> int:
    """Tokens whose logits, for two models, fit the device's budget; chunks of nearly equal size."""
    most = max(1, _BUDGET.get(device.type, _BUDGET["cuda"]) // (2 * vocabulary * element_size))
    chunks = -(-tokens // most)
    return max(1, -(-tokens // max(chunks, 1)))


def slices(tokens: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` tokens; the last may be smaller."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which a head's product is computed: fp32 where the CPU has no bf16 instructions."""
    if tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16):
        fast = tensor.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
        return tensor.dtype if fast else torch.float32
    return tensor.dtype


def run(problem: Problem, row_loss: RowLoss, size: int) -> Totals:
    """Loss and gradients of all tokens, holding the student's logits of `size` tokens."""
    dtype = product_dtype(problem.head)
    head = problem.head.to(dtype)
    tokens = len(problem.hidden)
    kl = problem.weight.new_zeros(())
    cross_entropy = kl.clone()
    grad_hidden = torch.zeros_like(problem.hidden) if problem.want_hidden else None
    grad_head = (
        torch.zeros_like(head, dtype=torch.promote_types(dtype, torch.float32)) if problem.want_head else None
    )
    valid = problem.weight != 0
    for part in slices(tokens, size):
        hidden = problem.hidden[part].to(dtype)
        logits = hidden @ head.t()
        token_kl, token_ce = row_loss(part, logits)
        kl += torch.where(valid[part], token_kl, 0).sum()
        cross_entropy += torch.where(valid[part], token_ce, 0).sum()
        if problem.want_grad:
            logits.masked_fill_(~valid[part].unsqueeze(-1), 0)
        if grad_hidden is not None:
            grad_hidden[part] = logits @ head
        if grad_head is not None:
            grad_head += logits.t() @ hidden.masked_fill(~valid[part].unsqueeze(-1), 0)
    return Totals(
        kl, cross_entropy, grad_hidden, None if grad_head is None else grad_head.to(problem.head.dtype)
    )
