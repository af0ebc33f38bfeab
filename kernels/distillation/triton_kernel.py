"""Rows of logits in Triton: one program a row, gradients in place of the student's logits.

A program walks its row twice (three times for the Jensen-Shannon divergence): once for maxima and sums,
which are rescaled whenever a maximum rises, and once to write the gradient. A row of 128256 logits in bf16
is 256 KB for each model, more than a multiprocessor holds, so both logits are read twice and the gradient
is written once. Sums are fp32, one a lane, added up at the end of the row: the order is fixed and the result
does not depend on the GPU. Logits are scaled by log2(e) / T on loading, so that every exponential is the
hardware's exp2.

Prefixes: `p_` pointer, `i_` index of the program, `o_` offsets, `b_` block in registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatapult.kernels.common.aot import AotCase
from qatapult.kernels.distillation.objective import Objective

#: Elements of a row at a time: with 8 warps 8 a thread, a 16-byte load of bf16 from each model. Four
#: programs then share a multiprocessor (64 registers a thread): reductions overlap with others' loads.
BLOCK = 2048
NUM_WARPS = 8
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _scaled(p_row, o_column, size, scale):  # type: ignore[no-untyped-def]
    """Logits times `scale`; beyond the row so low that exponentials are 0, yet differences finite."""
    return tl.load(p_row + o_column, mask=o_column < size, other=-1.0e30).to(tl.float32) * scale


@triton.jit
def _raise(high, b_logits):  # type: ignore[no-untyped-def]
    """The new maximum (0 while all is −inf) and what sums relative to the old one are multiplied with."""
    raised = tl.maximum(high, tl.max(b_logits, 0))
    anchor = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, anchor, tl.exp2(high - anchor)


@triton.jit
def _weigh(b_probability, b_value):  # type: ignore[no-untyped-def]
    """The product; 0 where the probability is 0, whatever the value."""
    return tl.where(b_probability > 0, b_probability * b_value, 0.0)


@triton.jit
def _mixed(b_student, b_teacher, lse_student, lse_teacher, beta):  # type: ignore[no-untyped-def]
    """q, p, log2(q / m) and log2(p / m) for m = beta p + (1 − beta) q."""
    b_q = tl.exp2(b_student - lse_student)
    b_p = tl.exp2(b_teacher - lse_teacher)
    b_mixture = beta * b_p + (1 - beta) * b_q
    b_log = tl.log2(tl.where(b_mixture > 0, b_mixture, 1.0))
    return b_q, b_p, b_student - lse_student - b_log, b_teacher - lse_teacher - b_log


@triton.jit
def divergence_kernel(  # type: ignore[no-untyped-def]
    p_student,
    p_teacher,
    p_labels,
    p_divergence,
    p_cross_entropy,
    size,
    student_stride,
    teacher_stride,
    temperature,
    beta,
    factor,
    hard,
    KIND: tl.constexpr,
    LABELLED: tl.constexpr,
    SEPARATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its divergence, its cross-entropy, and the gradient over the student's logits.

    `factor` is (1 − ce_weight) · T, `hard` is ce_weight; `SEPARATE` where the cross-entropy, at temperature
    1, has other exponentials than the divergence.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_student += i_row * student_stride
    p_teacher += i_row * teacher_stride
    scale = _LOG2E / temperature
    o_block = tl.arange(0, BLOCK)

    high_s = float("-inf")
    high_t = float("-inf")
    b_sum_s = tl.zeros([BLOCK], tl.float32)
    b_sum_t = tl.zeros([BLOCK], tl.float32)
    b_apart = tl.zeros([BLOCK], tl.float32)
    b_sum_h = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        b_s = _scaled(p_student, start + o_block, size, scale)
        b_t = _scaled(p_teacher, start + o_block, size, scale)
        if SEPARATE:
            _, anchor, shrink = _raise(high_s * temperature, b_s * temperature)
            b_sum_h = b_sum_h * shrink + tl.exp2(b_s * temperature - anchor)
        high_s, anchor_s, shrink_s = _raise(high_s, b_s)
        high_t, anchor_t, shrink_t = _raise(high_t, b_t)
        b_e_s = tl.exp2(b_s - anchor_s)
        b_e_t = tl.exp2(b_t - anchor_t)
        b_sum_s = b_sum_s * shrink_s + b_e_s
        b_sum_t = b_sum_t * shrink_t + b_e_t
        if KIND == "forward_kl":
            b_apart = b_apart * shrink_t + _weigh(b_e_t, b_t - b_s)
        if KIND == "reverse_kl":
            b_apart = b_apart * shrink_s + _weigh(b_e_s, b_s - b_t)
    label = -1
    target = 0.0
    if LABELLED:
        # Before the sums, whose barriers keep it ahead of every store of the gradient.
        label = tl.load(p_labels + i_row)
        target = tl.load(p_student + label).to(tl.float32)
    sum_s = tl.sum(b_sum_s, 0)
    sum_t = tl.sum(b_sum_t, 0)
    lse_s = high_s + tl.log2(sum_s)
    lse_t = high_t + tl.log2(sum_t)
    lse_h = lse_s
    if SEPARATE:
        lse_h = high_s * temperature + tl.log2(tl.sum(b_sum_h, 0))
    if LABELLED:
        tl.store(p_cross_entropy + i_row, lse_h * _LN2 - target)

    mean = 0.0
    if KIND == "forward_kl":
        divergence = tl.sum(b_apart, 0) / sum_t + lse_s - lse_t
    elif KIND == "reverse_kl":
        mean = tl.sum(b_apart, 0) / sum_s
        divergence = mean - lse_s + lse_t
    else:
        b_student = tl.zeros([BLOCK], tl.float32)
        b_teacher = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            b_s = _scaled(p_student, start + o_block, size, scale)
            b_t = _scaled(p_teacher, start + o_block, size, scale)
            b_q, b_p, b_log_q, b_log_p = _mixed(b_s, b_t, lse_s, lse_t, beta)
            b_student += _weigh(b_q, b_log_q)
            b_teacher += _weigh(b_p, b_log_p)
        mean = tl.sum(b_student, 0)
        divergence = beta * tl.sum(b_teacher, 0) + (1 - beta) * mean
    tl.store(p_divergence + i_row, divergence * _LN2)

    if GRADIENT:
        for start in range(0, size, BLOCK):
            o_column = start + o_block
            b_s = _scaled(p_student, o_column, size, scale)
            b_t = _scaled(p_teacher, o_column, size, scale)
            if KIND == "jsd":
                b_q, _, b_log_q, _ = _mixed(b_s, b_t, lse_s, lse_t, beta)
                b_slope = (1 - beta) * _LN2 * _weigh(b_q, b_log_q - mean)
            else:
                b_q = tl.exp2(b_s - lse_s)
                if KIND == "forward_kl":
                    b_slope = b_q - tl.exp2(b_t - lse_t)
                else:
                    b_slope = _LN2 * _weigh(b_q, b_s - b_t - mean)
            b_gradient = factor * b_slope
            if LABELLED:
                b_hard = b_q
                if SEPARATE:
                    b_hard = tl.exp2(b_s * temperature - lse_h)
                b_gradient += hard * (b_hard - tl.where(o_column == label, 1.0, 0.0))
            b_out = b_gradient.to(p_student.dtype.element_ty)
            tl.store(p_student + o_column, b_out, mask=o_column < size)


@triton.jit
def logsumexp_kernel(p_logits, p_out, size, stride, inverse, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: log Σ exp(logits · inverse)."""
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * stride
    o_block = tl.arange(0, BLOCK)
    high = float("-inf")
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        b_logits = _scaled(p_logits, start + o_block, size, inverse * _LOG2E)
        high, anchor, shrink = _raise(high, b_logits)
        b_sum = b_sum * shrink + tl.exp2(b_logits - anchor)
    tl.store(p_out + i_row, (high + tl.log2(tl.sum(b_sum, 0))) * _LN2)


@triton.jit
def exponential_kernel(  # type: ignore[no-untyped-def]
    p_logits,
    p_factor,
    p_shift,
    p_hard_shift,
    size,
    stride,
    inverse,
    hard,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: factor · exp(logits · inverse − shift) + hard · exp(logits − hard_shift)."""
    i_row = tl.program_id(1).to(tl.int64)
    p_logits += i_row * stride
    o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_logits = _scaled(p_logits, o_column, size, 1.0)
    b_out = tl.load(p_factor + i_row) * tl.exp2((b_logits * inverse - tl.load(p_shift + i_row)) * _LOG2E)
    if HARD:
        b_out += hard * tl.exp2((b_logits - tl.load(p_hard_shift + i_row)) * _LOG2E)
    tl.store(p_logits + o_column, b_out.to(p_logits.dtype.element_ty), mask=o_column < size)


def divergence_rows_(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """See `rows.divergence_rows_`; rows may be further apart than they are long."""
    rows, size = student.shape
    kl = torch.empty(rows, device=student.device)
    cross_entropy = torch.zeros(rows, device=student.device)
    factor = objective.kl_factor / objective.temperature
    separate = labels is not None and objective.temperature != 1
    block, warps = _block(size)
    with torch.cuda.device_of(student):
        divergence_kernel[(rows,)](
            *(student, teacher, labels, kl, cross_entropy, size, student.stride(0), teacher.stride(0)),
            *(float(objective.temperature), float(objective.beta), float(factor), float(objective.ce_weight)),
            *(objective.kind, labels is not None, separate, want_grad, block),
            num_warps=warps,
        )
    return kl, cross_entropy


def logsumexp_rows(logits: Tensor, inverse: float) -> Tensor:
    """See `rows.logsumexp_rows`."""
    rows, size = logits.shape
    out = torch.empty(rows, device=logits.device)
    block, warps = _block(size)
    with torch.cuda.device_of(logits):
        logsumexp_kernel[(rows,)](logits, out, size, logits.stride(0), float(inverse), block, num_warps=warps)
    return out


def exponential_rows_(
    logits: Tensor, factor: Tensor, shift: Tensor, inverse: float, hard_factor: float, hard_shift: Tensor
) -> None:
    """See `rows.exponential_rows_`."""
    rows, size = logits.shape
    block, warps = _block(size)
    columns = (factor.contiguous(), shift.contiguous(), hard_shift.contiguous())
    with torch.cuda.device_of(logits):
        exponential_kernel[(triton.cdiv(size, block), rows)](
            *(logits, *columns, size, logits.stride(0), float(inverse), float(hard_factor)),
            *(hard_factor != 0, block),
            num_warps=warps,
        )


def _block(size: int) -> tuple[int, int]:
    """Elements at a time, and warps."""
    block = min(BLOCK, max(128, triton.next_power_of_2(size)))
    return block, max(1, NUM_WARPS * block // BLOCK)


def aot_cases() -> list[AotCase]:
    """Each kind with and without labels, the dtypes, and the passes of cached teachers; see `common.aot`."""
    variants = [
        *(("bf16", kind, (False, False, True)) for kind in ("forward_kl", "reverse_kl", "jsd")),
        *(("bf16", kind, (True, True, True)) for kind in ("forward_kl", "reverse_kl", "jsd")),
        ("bf16", "forward_kl", (True, False, True)),
        ("bf16", "forward_kl", (False, False, False)),
        ("fp16", "forward_kl", (False, False, True)),
        ("fp32", "forward_kl", (False, False, True)),
    ]
    cases = [_divergence_case(*variant) for variant in variants]
    block = {"BLOCK": BLOCK}
    sizes = {"size": "i32", "stride": "i32", "inverse": "fp32"}
    signature = {"p_logits": "*bf16", "p_out": "*fp32", **sizes}
    cases.append(_case("logsumexp bf16", logsumexp_kernel, signature, block))
    columns = dict.fromkeys(("p_factor", "p_shift", "p_hard_shift"), "*fp32")
    signature = {"p_logits": "*bf16", **columns, **sizes, "hard": "fp32"}
    for hard in (False, True):
        constants = {"HARD": hard, **block}
        cases.append(_case(f"exponential bf16{' hard' * hard}", exponential_kernel, signature, constants))
    return cases


def _divergence_case(dtype: str, kind: str, flags: tuple[bool, bool, bool]) -> AotCase:
    labelled, separate, gradient = flags
    signature = {"p_student": f"*{dtype}", "p_teacher": f"*{dtype}"}
    constants: dict[str, Any] = {
        "KIND": kind,
        "LABELLED": labelled,
        "SEPARATE": separate,
        "GRADIENT": gradient,
        "BLOCK": BLOCK,
    }
    if labelled:
        signature["p_labels"] = "*i64"
    else:
        constants["p_labels"] = None
    signature |= dict.fromkeys(("p_divergence", "p_cross_entropy"), "*fp32")
    signature |= dict.fromkeys(("size", "student_stride", "teacher_stride"), "i32")
    signature |= dict.fromkeys(("temperature", "beta", "factor", "hard"), "fp32")
    name = f"{kind} {dtype}{' labels' * labelled}{' T' * separate}{'' if gradient else ' loss only'}"
    return _case(name, divergence_kernel, signature, constants)


def _case(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> AotCase:
    aligned = tuple(key for key, kind in signature.items() if kind[0] == "*" or kind == "i32")
    return AotCase(name, kernel, signature, constants, NUM_WARPS, aligned=aligned)
