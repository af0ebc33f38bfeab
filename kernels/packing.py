"""Dense storage of codes: the last dimension is packed into bytes.

Codes are stored unsigned (`code − qmin`), lowest bits first. With `b = scheme.storage_bits`, each byte holds
`8 / b` neighbouring codes; 3 bits do not divide a byte, so eight codes take three bytes (little-endian 24
bits). A row whose length is not a multiple of that is padded with the lowest code; `unpack` cuts the padding
off.
"""

from __future__ import annotations

import torch

from qatapult.kernels.scheme import Scheme


def packed_features(features: int, scheme: Scheme) -> int:
    """Bytes that a row of `features` codes takes."""
    codes, size = _unit(scheme)
    return -(-features // codes) * size


def pack(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Pack codes densely.

    Args:
        codes: integers in `[scheme.qmin, scheme.qmax]`, `[..., K]`, any K.
        scheme: gives the bits a code.

    Returns:
        uint8, `[..., packed_features(K, scheme)]`.

    Raises:
        ValueError: if a code lies outside the grid, which would spill into its neighbours.
    """
    if codes.numel() and not scheme.qmin <= int(codes.min()) <= int(codes.max()) <= scheme.qmax:
        raise ValueError(
            f"codes from {int(codes.min())} to {int(codes.max())} lie outside "
            f"[{scheme.qmin}, {scheme.qmax}] of {scheme.describe()}"
        )
    per_unit, size = _unit(scheme)
    unsigned = codes.to(torch.int32) - scheme.qmin
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % per_unit))
    units = unsigned.unflatten(-1, (unsigned.shape[-1] // per_unit, per_unit))
    words = (units << _shifts(per_unit, scheme.storage_bits, codes.device)).sum(-1, dtype=torch.int32)
    parts = (words[..., None] >> _shifts(size, 8, codes.device)) & 0xFF
    return parts.to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, scheme: Scheme, features: int) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8, `[..., packed_features(features, scheme)]`.
        scheme: as given to `pack`.
        features: codes in a row (K).

    Returns:
        int8 codes, `[..., features]`.

    Raises:
        ValueError: if the packed row has another length.
    """
    expected = packed_features(features, scheme)
    if packed.shape[-1] != expected:
        raise ValueError(
            f"packed rows of {packed.shape[-1]} bytes do not hold {features} codes of {scheme.describe()}: "
            f"that takes {expected}"
        )
    per_unit, size = _unit(scheme)
    parts = packed.unflatten(-1, (packed.shape[-1] // size, size)).to(torch.int32)
    words = (parts << _shifts(size, 8, packed.device)).sum(-1, dtype=torch.int32)
    codes = (words[..., None] >> _shifts(per_unit, scheme.storage_bits, packed.device)) & (
        (1 << scheme.storage_bits) - 1
    )
    return (codes + scheme.qmin).to(torch.int8).flatten(-2)[..., :features].contiguous()


def _unit(scheme: Scheme) -> tuple[int, int]:
    """Codes and bytes of the smallest piece that ends on a byte."""
    return (8, 3) if scheme.storage_bits == 3 else (8 // scheme.storage_bits, 1)


def _shifts(count: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, count * width, width, dtype=torch.int32, device=device)
