"""Launches of the Triton kernels, and the vendor's integer GEMM for plain codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qatapult.kernels.int_gemm.configs import (
    Config,
    GemmConfig,
    Problem,
    VectorConfig,
    choose_config,
    within_shared_memory,
)
from qatapult.kernels.int_gemm.tiles import TileLayout
from qatapult.kernels.int_gemm.triton_kernel import packed_gemm
from qatapult.kernels.int_gemm.triton_vector import packed_gemv

#: Counters of arrivals that launches outside of CUDA graphs share, by device and stream; zero between
#: launches.
_counters: dict[tuple[torch.device, int], Tensor] = {}
#: The same for launches inside graphs, each of which gets a stretch of its own, for graphs may run side by
#: side.
_graph_counters: dict[torch.device, Tensor] = {}
_graph_cursor: dict[torch.device, int] = {}
_COUNTERS = 1 << 20


def int_matmul_cuda(a: Tensor, b: Tensor) -> Tensor:
    """`a · bᵀ` in int32 by cuBLAS, whose shape limits (M > 16, K and N multiples of 8) are padded away."""
    rows, columns = a.shape[0], b.shape[0]
    if not a.numel() or not b.numel():
        return a.new_zeros((rows, columns), dtype=torch.int32)
    features = -a.shape[1] % 16
    a = pad(a, (0, features, 0, max(0, 17 - rows)))
    b = pad(b, (0, features, 0, -columns % 16))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:rows, :columns].contiguous()


def packed_product_triton(
    x: Tensor,
    token_scale: Tensor | None,
    tiles: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    layout: TileLayout,
    half: bool,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """`x · Wᵀ` with scales and bias, [M, N].

    Args:
        x: int8 codes, or fp16 / bf16 activations: [M, K].
        token_scale: fp32 [M, 1] beside codes, None beside activations.
        tiles: of `to_tiles`.
        scale: fp32 [N, G].
        shift: zero points, fp32 [N, G], or None.
        bias: [N] or None.
        layout: of the tiles.
        half: codes stand for code + 1/2 (a stretched grid).
        dtype: of the result; int32 gives the bare sums (per-channel scales only).
        config: chosen by the tables if None.
    """
    (m, k), (n, groups) = x.shape, scale.shape
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    group = 0 if groups == 1 else k // groups
    span = layout.span(group)
    units = tiles.shape[0]
    integer = token_scale is not None or x.dtype == torch.int8
    if config is None:
        problem = Problem(m, n, k, layout.bits, group, 8 if integer else 16)
        vector = m == 1 and integer and shift is None and k % layout.unit == 0
        capability = _capability(x.device)
        config = choose_config(problem, capability, layout.unit, vector)
        if isinstance(config, GemmConfig):
            unit_bytes = layout.planes * layout.slice_width
            sizes = (layout.unit, unit_bytes, layout.slice_width, x.element_size())
            config = within_shared_memory(config, *sizes, capability)
    if isinstance(config, VectorConfig):
        _launch_vector(x, token_scale, tiles, scale, bias, y, layout, half, config)
        return y
    row_sum = None
    if shift is not None and integer:
        stretch = span * layout.slice_width if group else k
        row_sum = x.unflatten(1, (-1, stretch)).sum(-1, dtype=torch.int32).t().contiguous()
    blocks = _ceil(n, config.block_n) * _ceil(m, config.block_m)
    shift_in_groups = shift is not None and group > 0
    partial = counter = None
    if config.split > 1:
        size = blocks * config.split * config.block_m * config.block_n
        partial_dtype = torch.int32 if integer and not group else torch.float32
        partial = torch.empty(size, dtype=partial_dtype, device=x.device)
        counter = _counter(x.device, blocks)
    packed_gemm[(blocks, config.split)](
        x.contiguous(),
        tiles.view(torch.int8),
        y,
        token_scale,
        scale.t().contiguous(),
        None if shift is None else shift.t().contiguous(),
        row_sum,
        bias,
        partial,
        counter,
        m,
        n,
        k,
        tiles.shape[2],
        units,
        BITS=layout.bits,
        WIDTH=layout.slice_width,
        GROUP=group,
        HALF=int(half),
        INTEGER=integer,
        HAS_SHIFT=shift is not None,
        HAS_BIAS=bias is not None,
        RAW=dtype == torch.int32,
        EVEN_K=k % layout.unit == 0,
        SPAN=span,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        SPLIT=config.split,
        RASTER=config.raster,
        WHOLE=integer and layout.takes_whole_units(group) and not shift_in_groups,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


def _launch_vector(
    x: Tensor,
    token_scale: Tensor | None,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: TileLayout,
    half: bool,
    config: VectorConfig,
) -> None:
    """The product with one token of codes, into y [1, N]; K is a multiple of a unit, weights are symmetric."""
    n, groups = scale.shape
    group = 0 if groups == 1 else x.shape[1] // groups
    packed_gemv[(_ceil(n, config.rows),)](
        x.contiguous().view(torch.int32),
        tiles.view(torch.int32),
        y,
        token_scale,
        scale.t().contiguous(),
        bias,
        n,
        tiles.shape[2],
        tiles.shape[0],
        BITS=layout.bits,
        WIDTH=layout.slice_width,
        GROUP=group,
        HALF=int(half),
        HAS_BIAS=bias is not None,
        RAW=y.dtype == torch.int32,
        SPAN=layout.span(group),
        ROWS=config.rows,
        UNITS=config.units,
        num_warps=config.warps,
    )


def _ceil(number: int, parts: int) -> int:
    """Division rounded up; Triton's own takes microseconds on the host."""
    return -(-number // parts)


def _counter(device: torch.device, blocks: int) -> Tensor:
    """Zeros that the launch leaves as zeros, so that nothing has to be cleared before each product."""
    if device.type != "cuda":
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _graph_counter(device, blocks)
    stream = torch.cuda.current_stream(device).cuda_stream
    held = _counters.get((device, stream))
    if held is None or held.numel() < blocks:
        held = torch.zeros(max(blocks, 1 << 16), dtype=torch.int32, device=device)
        _counters[device, stream] = held
        _graph_counters.setdefault(device, torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
    return held


def _graph_counter(device: torch.device, blocks: int) -> Tensor:
    held = _graph_counters.get(device)
    if held is None or blocks > held.numel():
        # No product ran on this device before the capture: the clearing becomes part of the graph.
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    start = _graph_cursor.get(device, 0)
    if start + blocks > held.numel():
        start = 0
    _graph_cursor[device] = start + blocks
    return held[start : start + blocks]


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
