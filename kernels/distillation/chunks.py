"""The loop over chunks of tokens: product with the student's head, the rows' losses, products back.

The logits of one chunk live in one buffer, in which the rows' gradients replace them, so the next product
reads them from there. Everything is a sum over tokens: a mean is taken by the caller, outside the registered
operator, so that in fp16 neither the stored gradients of the logits nor those of the hidden states underflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes that the logits of one chunk may take, for student and teacher together.
_BUDGET = {"cpu": 88 << 20, "cuda": 1280 << 20}
#: Below this many rows the products with the heads lose more time than the memory is worth.
_LEAST = {"cpu": 64, "cuda": 512}
#: Rows of a chunk are a multiple of this, so that the products' last tiles are full.
_MULTIPLE = {"cpu": 16, "cuda": 64}

#: (tokens, logits of the student) → (divergence, cross-entropy) of each token; see `rows.divergence_rows_`.
RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Student:
    """Tokens that count, `[T, D]`, the head `[V, D]`, and which gradients are wanted."""

    hidden: Tensor
    head: Tensor
    want_hidden: bool
    want_head: bool

    @property
    def want_grad(self) -> bool:
        """Whether the logits' gradient is needed at all."""
        return self.want_hidden or self.want_head


@dataclass
class Sums:
    """Over all tokens: divergence (without T²) and cross-entropy, `[]`; the gradients that were wanted."""

    kl: Tensor
    cross_entropy: Tensor
    grad_hidden: Tensor | None
    grad_head: Tensor | None


def chunk_size(tokens: int, head: Tensor) -> int:
    """Tokens of a chunk: what fits the budget, in chunks of nearly equal size."""
    kind = "cpu" if head.device.type == "cpu" else "cuda"
    row, multiple = 2 * head.shape[0] * product_dtype(head).itemsize, _MULTIPLE[kind]
    most = max(_BUDGET[kind] // row // multiple * multiple, _LEAST[kind])
    even = -(-tokens // max(1, -(-tokens // most)))
    return max(1, min(tokens, -(-even // multiple) * multiple))


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of a product with a head: fp32 on CPUs without instructions for 16 bits, where it is faster."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if tensors[0].device.type != "cpu" or dtype.itemsize > 2:
        return dtype
    fast = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return dtype if fast else torch.float32


class Logits:
    """`hidden · headᵀ` of one chunk at a time, in one buffer."""

    def __init__(self, hidden: Tensor, head: Tensor, size: int) -> None:
        self.dtype = product_dtype(hidden, head)
        self.hidden, self.head = hidden, head.to(self.dtype)
        # On a GPU rows start at multiples of 128 bytes, whatever the vocabulary, for loads of 16 bytes.
        width = len(head) if head.device.type == "cpu" else -(-len(head) // 64) * 64
        self._buffer = hidden.new_empty(min(size, len(hidden)), width, dtype=self.dtype)[:, : len(head)]

    def of(self, part: slice) -> Tensor:
        """`[tokens of the slice, V]`; valid until the next call."""
        hidden = self.chunk(part)
        return torch.mm(hidden, self.head.t(), out=self._buffer[: len(hidden)])

    def chunk(self, part: slice) -> Tensor:
        """The hidden states of the slice in the product's dtype."""
        return self.hidden[part].to(self.dtype)


def run(student: Student, row_loss: RowLoss, size: int) -> Sums:
    """Losses and gradients, holding the student's logits of `size` tokens."""
    tokens = len(student.hidden)
    logits = Logits(student.hidden, student.head, size)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kl, cross_entropy = student.hidden.new_zeros(2, tokens, dtype=dtype)
    grad_hidden = torch.empty_like(student.hidden) if student.want_hidden else None
    grad_head = torch.zeros_like(logits.head) if student.want_head else None
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        chunk = logits.of(part)
        kl[part], cross_entropy[part] = row_loss(part, chunk)
        if grad_hidden is not None:
            grad_hidden[part] = chunk @ logits.head
        if grad_head is not None:
            grad_head.addmm_(chunk.t(), logits.chunk(part))
    if grad_head is not None:
        grad_head = grad_head.to(student.head.dtype)
    return Sums(kl.sum(), cross_entropy.sum(), grad_hidden, grad_head)
