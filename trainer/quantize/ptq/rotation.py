"""Rotations of a LLaMA-class model's hidden space that leave its outputs as they are.

RMSNorm without weights commutes with orthogonal matrices, so the residual stream can be turned by any
orthogonal `Q` that is folded into the weights on both of its sides: outliers spread over all channels, and
grids fit better. This is the offline half of QuaRot (Ashkboos et al., arXiv:2404.00456, section 4, stages 1a
and 1b: `R1` on the residual stream, `R2` on each value head); the online Hadamard transforms before
`down_proj` and on queries and keys would change the model that is served, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.trainer.quantize.ptq.calibration import decoder_blocks
from qatapult.trainer.quantize.ptq.folding import folds_of
from qatapult.trainer.recipe.errors import UserError


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix (entries ±1, orthogonal rows), fp64 `[size, size]`, or None if none is known here.

    Sizes `m · 2^k` with `m` 1 or from Paley's two constructions over a prime: 12, 20, 24, 28, 36, 44, 60, ….
    """
    for doublings in range(size.bit_length()):
        if size % 2**doublings:
            return None
        core = _paley(size // 2**doublings)
        if core is not None:
            double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            for _ in range(doublings):
                core = torch.kron(core, double)
            return core
    return None


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs of its rows, scaled to be orthogonal; fp64 `[size, size]`.

    Where no Hadamard matrix of the size is known, a random orthogonal one.
    """
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    matrix = hadamard(size)
    if matrix is None:
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix = torch.linalg.qr(gaussian).Q * math.sqrt(size)
    return signs * matrix / math.sqrt(size)


def _paley(size: int) -> Tensor | None:
    """Paley's Hadamard matrices: `p + 1` for primes p ≡ 3 mod 4, and `2 (p + 1)` for primes p ≡ 1 mod 4."""
    if size in (1, 2):
        return torch.tensor([[1.0]] if size == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    if (size - 1) % 4 == 3 and _is_prime(size - 1):
        return identity + _conference(size - 1)
    half = size // 2
    if size % 2 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        conference, identity = _conference(half - 1), torch.eye(half, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(identity, minus)
    return None


def _conference(prime: int) -> Tensor:
    """Zeros on the diagonal and ±1 elsewhere, `[prime + 1, prime + 1]`: quadratic residues, with a border."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)]).double()
    index = (torch.arange(prime).unsqueeze(1) - torch.arange(prime)) % prime
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1
    matrix[1:, 1:] = character[index]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@torch.no_grad()
def fold_norms(model: PreTrainedModel) -> None:
    """Move every RMSNorm's weight into the linears that read it, so that norms only normalize.

    Embeddings that were tied to the output head get a copy of their own, because the last norm's weight moves
    into the head.

    Raises:
        UserError: for blocks of another structure than LLaMA's.
    """
    untie(model)
    for block in decoder_blocks(model):
        for fold in folds_of(block):
            if not isinstance(fold.producer, nn.Linear):
                _fold_norm(fold.producer, fold.consumers)
    _fold_norm(_last_norm(model), (model.get_output_embeddings(),))


@torch.no_grad()
def rotate(model: PreTrainedModel, residual: Tensor, heads: list[Tensor] | None) -> None:
    """Turn the residual stream of a model whose norms are folded, and the values of each head.

    Args:
        model: after `fold_norms`.
        residual: `R1`, orthogonal `[D, D]`: a hidden state `x` becomes `x · R1`.
        heads: `R2` of each block, orthogonal `[head, head]`, or None to leave values as they are.

    Raises:
        UserError: for blocks of another structure than LLaMA's.
    """
    _turn_inputs(model.get_input_embeddings(), residual)
    _turn_inputs(model.get_output_embeddings(), residual)
    for index, block in enumerate(decoder_blocks(model)):
        inputs, values, hidden, product = folds_of(block)
        for reader in (*inputs.consumers, *hidden.consumers):
            _turn_inputs(reader, residual)
        for writer in (*values.consumers, *product.consumers):
            _turn_outputs(writer, residual)
        if heads is not None:
            value, (output,) = values.producer, values.consumers
            turn = heads[index]
            _turn_outputs(value, torch.block_diag(*[turn] * (len(_weight(value)) // len(turn))))
            _turn_inputs(output, torch.block_diag(*[turn] * (_weight(output).shape[1] // len(turn))))


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give the output head a weight of its own, if it shares the embeddings'."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if _weight(head) is _weight(embeddings):
        head.weight = nn.Parameter(_weight(embeddings).detach().clone())
    model.config.tie_word_embeddings = False


def untie_for(model: PreTrainedModel, tensors: Path) -> None:
    """Untie a model's head if a safetensors file holds both the head's weight and the embeddings'.

    A model that was saved while it was tied has only one of them.
    """
    names = {module: name for name, module in model.named_modules()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    with safe_open(tensors, framework="pt") as file:
        if {f"{names[end]}.weight" for end in ends} <= set(file.keys()):
            untie(model)


def _fold_norm(norm: nn.Module, readers: Sequence[nn.Module]) -> None:
    for reader in readers:
        _weight(reader).mul_(_weight(norm))
    _weight(norm).fill_(1)


def _turn_inputs(layer: nn.Module, turn: Tensor) -> None:
    """`W ← W · Q`: the layer reads (an embedding: gives) vectors that were multiplied with Q."""
    weight = _weight(layer)
    weight.copy_((weight.double() @ turn.to(weight.device)).to(weight.dtype))


def _turn_outputs(layer: nn.Module, turn: Tensor) -> None:
    """`W ← Qᵀ · W`: the layer's outputs are multiplied with Q."""
    weight, bias = _weight(layer), getattr(layer, "bias", None)
    turn = turn.to(weight.device)
    weight.copy_((turn.t() @ weight.double()).to(weight.dtype))
    if isinstance(bias, nn.Parameter):
        bias.copy_((bias.double() @ turn).to(bias.dtype))


def _last_norm(model: PreTrainedModel) -> nn.Module:
    norm = getattr(getattr(model, model.base_model_prefix), "norm", None)
    if not isinstance(norm, nn.Module):
        raise UserError(f"ptq: {type(model).__name__} has no final norm where LLaMA has it: use rtn or gptq")
    return norm


def _weight(module: nn.Module) -> nn.Parameter:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight
