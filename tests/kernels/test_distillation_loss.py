"""`distillation_loss` and `topk_distillation_loss`: values, gradients and memory, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatapult.kernels import distillation_loss, topk_distillation_loss, use_backend
from qatapult.kernels.distillation import chunks, op, reference
from qatapult.kernels.distillation.objective import Objective

KINDS = ["forward_kl", "reverse_kl", "jsd"]
#: Options of the loss: plain, a temperature, cross-entropy mixed in at temperature 1, and both.
OPTIONS = [
    {},
    {"temperature": 2.5},
    {"ce_weight": 0.3},
    {"temperature": 0.7, "ce_weight": 0.6, "beta": 0.2},
]


class Case:
    """Random hidden states, heads and labels; the student's require gradients."""

    def __init__(
        self,
        tokens: int = 7,
        vocabulary: int = 131,
        dim: int = 16,
        teacher_dim: int = 11,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        scale: float = 1.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

        self.student_hidden = draw(tokens, dim).requires_grad_()
        self.student_head = draw(vocabulary, dim).requires_grad_()
        self.teacher_hidden = draw(tokens, teacher_dim)
        self.teacher_head = draw(vocabulary, teacher_dim)
        self.labels = torch.randint(vocabulary, (tokens,), generator=random).to(device)

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_head

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self.student, self.teacher_hidden, self.teacher_head)

    def cached(self, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's top k tokens, their log-probabilities, and the tail's mass, in float64."""
        logits = self.teacher_hidden.double() @ self.teacher_head.double().t() / temperature
        logprobs, indices = logits.log_softmax(-1).topk(k)
        return indices, logprobs, (1 - logprobs.exp().sum(-1)).clamp(min=0)

    def expected(self, options: dict[str, Any], k: int | None = None, **rest: Any) -> list[Tensor]:
        """Loss and gradients by the reference, in float64 on the CPU."""
        student = [tensor.detach().double().cpu().requires_grad_() for tensor in self.student]
        objective = Objective(**options)
        if k is None:
            teacher = [tensor.double().cpu() for tensor in (self.teacher_hidden, self.teacher_head)]
            loss = reference.distillation_loss(*student, *teacher, objective, **rest)
        else:
            cached = [tensor.cpu() for tensor in self.cached(k, objective.temperature)]
            loss = reference.topk_distillation_loss(*student, *cached, objective, **rest)
        return [loss.detach(), *torch.autograd.grad(loss, student)]


def loss_and_gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, case.student)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    """Each within `tolerance` of the largest magnitude expected in it, or of 0.1 if that is more: gradients
    are differences of probabilities."""
    for ours, theirs in zip(actual, expected, strict=True):
        bound = tolerance * max(theirs.abs().max().item(), 0.1) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double().cpu(), theirs.double(), atol=bound, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_formula(backend: Any, kind: str, options: dict[str, Any]) -> None:
    case = Case(device=backend.device)
    options = {"kind": kind, **options}
    loss = distillation_loss(*case.tensors, labels=case.labels, chunk_tokens=3, **options)
    assert_close(loss_and_gradients(loss, case), case.expected(options, labels=case.labels.cpu()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_loss_is_the_formula(backend: Any, kind: str, options: dict[str, Any]) -> None:
    case = Case(device=backend.device)
    options = {"kind": kind, **options}
    cached = case.cached(5, options.get("temperature", 1.0))
    loss = topk_distillation_loss(*case.student, *cached, labels=case.labels, chunk_tokens=3, **options)
    assert_close(loss_and_gradients(loss, case), case.expected(options, 5, labels=case.labels.cpu()))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (9, 70, 12, 12))),
    kind=st.sampled_from(KINDS),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.5, 4),
            "beta": st.floats(0.05, 0.95),
            "ce_weight": st.floats(0, 1),
        },
    ),
    chunk=st.integers(1, 10),
    k=st.integers(0, 70),
    seed=st.integers(0, 10**6),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_any_shape(
    shape: tuple[int, int, int, int],
    kind: str,
    options: dict[str, Any],
    chunk: int,
    k: int,
    seed: int,
    backend: Any,
) -> None:
    case = Case(*shape, seed=seed)
    options = {"kind": kind, **options}
    valid = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.6
    common = {"labels": case.labels, "mask": valid, "chunk_tokens": chunk, **options}
    k = min(k, shape[1] - 1)
    with use_backend(backend):
        if k:
            cached = case.cached(k, options.get("temperature", 1.0))
            # Without a tail the reverse divergence is infinite, as documented.
            assume(kind == "forward_kl" or float(cached[2].min()) > 1e-5)
            loss = topk_distillation_loss(*case.student, *cached, **common)
        else:
            loss = distillation_loss(*case.tensors, **common)
    expected = case.expected(options, k or None, labels=case.labels, valid=valid)
    assert_close(loss_and_gradients(loss, case), expected, tolerance=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Any) -> None:
    case = Case(3, 7, 4, 5, dtype=torch.float64)
    options: dict[str, Any] = {"kind": kind, "temperature": 1.5, "ce_weight": 0.4, "labels": case.labels}

    def full(hidden: Tensor, head: Tensor) -> Any:
        return distillation_loss(hidden, head, case.teacher_hidden, case.teacher_head, **options)

    def cached(hidden: Tensor, head: Tensor) -> Any:
        return topk_distillation_loss(hidden, head, *case.cached(3, 1.5), **options)

    assert torch.autograd.gradcheck(full, case.student)
    assert torch.autograd.gradcheck(cached, case.student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(backend: Any, dtype: torch.dtype) -> None:
    case = Case(20, 300, 32, 24, dtype=dtype, device=backend.device, scale=0.5)
    loss = distillation_loss(*case.tensors)
    assert loss.dtype == torch.float32
    actual = loss_and_gradients(loss, case)
    assert [gradient.dtype for gradient in actual[1:]] == [dtype, dtype]
    assert_close(actual, case.expected({}), tolerance=2e-2)


def test_logits_in_bf16_on_the_compiled_path() -> None:
    """What a CPU with bf16 instructions computes: the rows are read and written in bf16."""
    case = Case(8, 300)
    logits = [(hidden @ head.t()).detach() for hidden, head in (case.tensors[:2], case.tensors[2:])]
    rounded = [logit.bfloat16() for logit in logits]
    objective = Objective(ce_weight=0.2)
    with use_backend("cpu"):
        kernels = op.row_kernels(rounded[0])
    exact = [logit.float() for logit in rounded]
    expected = kernels.divergence_rows_(*exact, case.labels, objective, True)
    actual = kernels.divergence_rows_(*rounded, case.labels, objective, True)
    assert_close([*actual], [*expected], 1e-6)
    torch.testing.assert_close(rounded[0], exact[0].bfloat16(), atol=0, rtol=0)


def test_a_shift_of_all_logits_changes_nothing(backend: Any) -> None:
    """Logits around ±1000, where exp overflows unless the maximum is taken out first."""
    case = Case(5, 50, 4, 4, dtype=torch.float32, device=backend.device)
    shifted = Case(5, 50, 4, 4, device=backend.device)
    with torch.no_grad():
        shift = torch.full((50, 1), 1000.0, device=backend.device)
        shifted.student_head = torch.cat([shifted.student_head, shift], 1).requires_grad_()
        shifted.teacher_head = torch.cat([shifted.teacher_head, -shift], 1)
        one = torch.ones(5, 1, device=backend.device)
        shifted.student_hidden = torch.cat([shifted.student_hidden, one], 1).requires_grad_()
        shifted.teacher_hidden = torch.cat([shifted.teacher_hidden, one], 1)
    actual = loss_and_gradients(distillation_loss(*shifted.tensors), shifted)
    expected = case.expected({})
    assert_close([actual[0], actual[1][:, :-1], actual[2][:, :-1]], expected, 2e-3)


def test_no_token_counts(backend: Any) -> None:
    case = Case(device=backend.device)
    nothing = torch.zeros(7, dtype=torch.bool, device=backend.device)
    for loss, parts in (
        distillation_loss(*case.tensors, mask=nothing, return_parts=True),
        topk_distillation_loss(*case.student, *case.cached(3), mask=nothing, return_parts=True),
    ):
        assert loss == 0
        assert parts["tokens"] == 0
        assert all(not gradient.any() for gradient in loss_and_gradients(loss, case)[1:])


def test_no_tokens_at_all() -> None:
    case = Case(tokens=0)
    loss = distillation_loss(*case.tensors)
    assert loss == 0
    assert not loss_and_gradients(loss, case)[2].any()


def test_ignored_tokens_take_no_part(backend: Any) -> None:
    """Not even where they hold NaN."""
    case = Case(device=backend.device)
    labels = case.labels.clone()
    labels[[1, 4]] = -100
    mask = torch.ones(7, device=backend.device)
    mask[6] = 0
    with torch.no_grad():
        case.student_hidden[[1, 4, 6]] = math.nan
        case.teacher_hidden[[1, 4, 6]] = math.nan
    loss, parts = distillation_loss(*case.tensors, labels=labels, mask=mask, ce_weight=0.5, return_parts=True)
    actual = loss_and_gradients(loss, case)
    assert parts["tokens"] == 4
    assert not actual[1][[1, 4, 6]].any()
    kept = [0, 2, 3, 5]
    with torch.no_grad():
        case.student_hidden, case.teacher_hidden = case.student_hidden[kept], case.teacher_hidden[kept]
    expected = case.expected({"ce_weight": 0.5}, labels=labels[kept].cpu())
    assert_close([actual[0], actual[1][kept], actual[2]], expected)


def test_parts_and_sums_add_up() -> None:
    case = Case()
    options: dict[str, Any] = {"labels": case.labels, "temperature": 2.0, "ce_weight": 0.25}
    loss, parts = distillation_loss(*case.tensors, reduction="sum", return_parts=True, **options)
    torch.testing.assert_close(loss, 0.75 * parts["kl"] + 0.25 * parts["ce"])
    torch.testing.assert_close(loss / parts["tokens"], distillation_loss(*case.tensors, **options))
    logits = case.student_hidden @ case.student_head.t()
    torch.testing.assert_close(
        parts["ce"], torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum").detach()
    )


def test_tokens_may_have_several_dimensions() -> None:
    case = Case(tokens=6)
    flat = distillation_loss(*case.tensors, labels=case.labels)
    folded = [tensor.reshape(2, 3, -1) for tensor in (case.student_hidden, case.teacher_hidden)]
    loss = distillation_loss(
        folded[0], case.student_head, folded[1], case.teacher_head, labels=case.labels.reshape(2, 3)
    )
    assert loss == flat
    assert_close(loss_and_gradients(loss, case), loss_and_gradients(flat, case), 1e-6)


def test_same_bits_every_time_and_on_any_number_of_threads() -> None:
    case = Case(40, 500)
    first = loss_and_gradients(distillation_loss(*case.tensors, chunk_tokens=16), case)
    threads = torch.get_num_threads()
    logits = [(hidden @ head.t()).detach() for hidden, head in (case.tensors[:2], case.tensors[2:])]
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = [logit.clone() for logit in logits]
            kernels = op.row_kernels(rows[0])
            results.append((*kernels.divergence_rows_(*rows, None, Objective(), True), rows[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    again = loss_and_gradients(distillation_loss(*case.tensors, chunk_tokens=16), case)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_student_that_is_the_teacher_has_nothing_to_learn(backend: Any) -> None:
    case = Case(device=backend.device)
    for kind in KINDS:
        loss = distillation_loss(*case.student, *case.student, kind=kind)  # type: ignore[arg-type]
        loss, *gradients = loss_and_gradients(loss, case)
        assert abs(loss) < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_gradients_only_where_wanted() -> None:
    case = Case()
    teacher = case.teacher_hidden.requires_grad_(), case.teacher_head.requires_grad_()
    hidden, head = case.student
    distillation_loss(hidden, head.detach(), *teacher).backward()
    assert hidden.grad is not None
    assert all(tensor.grad is None for tensor in teacher)
    distillation_loss(hidden.detach(), head, *teacher).backward()
    assert_close([hidden.grad, head.grad], case.expected({})[1:])  # type: ignore[list-item]
    with torch.no_grad():
        assert not distillation_loss(*case.tensors).requires_grad


def test_gradient_is_scaled_by_what_comes_from_above() -> None:
    case = Case()
    plain = loss_and_gradients(distillation_loss(*case.tensors), case)
    tripled = loss_and_gradients(3 * distillation_loss(*case.tensors), case)
    assert_close(tripled, [3 * tensor for tensor in plain], 1e-6)


def test_cache_of_the_whole_vocabulary_is_the_whole_loss() -> None:
    case = Case(5, 30, dtype=torch.float64)
    for kind in KINDS:
        whole = distillation_loss(*case.tensors, kind=kind)  # type: ignore[arg-type]
        indices, logprobs, _ = case.cached(30)
        cached = topk_distillation_loss(*case.student, indices, logprobs, kind=kind)  # type: ignore[arg-type]
        assert_close(loss_and_gradients(cached, case), loss_and_gradients(whole, case), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_short_rows_are_filled_up_with_their_first_token(kind: str) -> None:
    """A row of three tokens and two fillers is worth what it is worth alone, in value and gradients."""
    case = Case(5, 30, dtype=torch.float64)
    options: dict[str, Any] = {"kind": kind, "ce_weight": 0.3, "labels": case.labels}
    indices, logprobs, tail = case.cached(3)
    short = topk_distillation_loss(*case.student, indices, logprobs, tail, **options)
    filled = [
        torch.cat([indices, *[indices[..., :1]] * 2], -1),
        torch.cat([logprobs, torch.zeros_like(logprobs[..., :2])], -1),
        tail,
    ]
    padded = topk_distillation_loss(*case.student, *filled, **options)
    assert_close(loss_and_gradients(padded, case), loss_and_gradients(short, case), 1e-12)


def test_cache_without_a_tail_takes_what_is_left_and_never_exceeds_the_whole_loss() -> None:
    case = Case(5, 30, dtype=torch.float64)
    indices, logprobs, tail = case.cached(4)
    loss = topk_distillation_loss(*case.student, indices, logprobs)
    torch.testing.assert_close(loss, topk_distillation_loss(*case.student, indices, logprobs, tail))
    assert loss < distillation_loss(*case.tensors)


def test_autocast() -> None:
    case = Case(20, 300, 32, 24, scale=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(case.student_hidden.bfloat16(), *case.tensors[1:])
    actual = loss_and_gradients(loss, case)
    assert actual[2].dtype == torch.float32
    assert_close(actual, case.expected({}), 3e-2)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_opcheck(name: Any) -> None:
    case = Case(4, 9, 3, 5)
    options = ("jsd", 2.0, 0.3, 0.4, 3, True, True)
    valid = torch.tensor([True, False, True, True])
    buckets = torch.randn(4, 3).log_softmax(-1)
    indices = torch.tensor([[0, 1], [2, 3], [4, 8], [8, 7]])
    with use_backend(name):
        torch.library.opcheck(op.distillation_sums, (*case.tensors, case.labels, valid, *options))
        arguments = (*case.student, indices, buckets, case.labels, valid, *options)
        torch.library.opcheck(op.topk_distillation_sums, arguments)


def test_compiles_in_one_graph() -> None:
    case = Case()

    def loss(hidden: Tensor, head: Tensor) -> Any:
        return distillation_loss(hidden * 2, head, *case.tensors[2:], labels=case.labels, ce_weight=0.1)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(
        loss_and_gradients(compiled(*case.student), case), loss_and_gradients(loss(*case.student), case), 1e-6
    )


def _peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator held at a time beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = (event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(accumulate(held), default=0)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_logits_of_all_tokens_are_never_held(name: Any) -> None:
    case = Case(512, 2000, 16, 16)
    whole = 512 * 2000 * 4

    def run(loss: Callable[..., Tensor]) -> None:
        with use_backend(name):
            loss(*case.tensors, chunk_tokens=16).backward()

    cached = case.cached(4)
    gradients = (512 * 16 + 2000 * 16) * 4
    assert _peak_bytes(lambda: reference.distillation_loss(*case.tensors, Objective()).backward()) > 4 * whole
    assert _peak_bytes(lambda: run(distillation_loss)) < 0.4 * whole + 2 * gradients

    def from_cache(*tensors: Tensor, **options: Any) -> Tensor:
        loss: Tensor = topk_distillation_loss(*tensors[:2], *cached, **options)
        return loss

    assert _peak_bytes(lambda: run(from_cache)) < 0.4 * whole + 2 * gradients


def test_only_gradients_are_saved_for_backward() -> None:
    case = Case(64, 500, 16, 16)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_loss(case.student_hidden, case.student_head.detach(), *case.tensors[2:])
    assert case.student_hidden.numel() <= sum(saved) <= case.student_hidden.numel() + 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind='kl' is not one of forward_kl"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"kind": "jsd", "beta": 1.0}, "kind='reverse_kl'"),
        ({"ce_weight": 1.5}, "ce_weight=1.5 must be from 0 to 1"),
        ({"ce_weight": 0.5}, "needs labels"),
        ({"reduction": "none"}, "reduction='none' is not one of mean, sum"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels covers \[3\], student_hidden \[7\]"),
        ({"mask": torch.zeros(3)}, "mask covers"),
        ({"labels": torch.full((7,), 131)}, r"labels has token 131, outside 0 … 130"),
        ({"student_head": torch.zeros(0)}, "GatheredParameters"),
        ({"student_head": torch.zeros(131, 9)}, "the last dimensions must agree"),
        ({"teacher_head": torch.zeros(130, 11)}, "they must share one"),
        ({"teacher_hidden": torch.zeros(6, 11)}, "teacher_hidden covers"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, Case().tensors, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_indices": torch.full((7, 3), 131)}, "top_indices has token 131"),
        ({"top_logprobs": torch.zeros(7, 4)}, "top_logprobs covers"),
        ({"tail_mass": torch.zeros(6)}, "tail_mass covers"),
    ],
)
def test_refused_cache(change: dict[str, Any], message: str) -> None:
    case = Case()
    cached = dict(zip(("top_indices", "top_logprobs", "tail_mass"), case.cached(3), strict=True))
    with pytest.raises(ValueError, match=message):
        topk_distillation_loss(*case.student, **(cached | change))


def test_chunks_fit_the_budget_and_are_even() -> None:
    """On `meta`, which counts as a GPU: the shapes of a large model need no memory here."""
    head = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    assert chunks.chunk_size(8192, head) == 2048
    assert chunks.chunk_size(100, head) == 100
    for tokens in (1, 1000, 5000, 8191):
        size = chunks.chunk_size(tokens, head)
        assert 1 <= size <= tokens
        assert 2 * size * 128256 * 2 <= 1.25 * 2**30
    small = torch.empty(49152, 576)
    assert all(
        2 * chunks.chunk_size(tokens, small) * 49152 * 4 <= 88 * 2**20 for tokens in (1024, 2048, 3001)
    )


def test_logits_whose_rows_are_padded_are_the_product() -> None:
    """As on a GPU, where rows of an odd vocabulary start at multiples of 128 bytes."""
    case = Case(5, 70, 8)
    logits = chunks.Logits(case.student_hidden.detach(), case.student_head.detach(), 5)
    logits._buffer = torch.empty(5, 128)[:, :70]
    product = logits.of(slice(0, 5))
    assert product.stride() == (128, 1)
    torch.testing.assert_close(product, (case.student_hidden @ case.student_head.t()).detach())
