"""What a distillation loss measures, apart from the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Objective:
    """`(1 − ce_weight) · T² · D(teacher, student) + ce_weight · cross-entropy` of one token.

    Attributes:
        kind: the divergence `D`; see `reference.divergence`.
        temperature: `T`; both distributions are `softmax(logits / T)`. The factor T² keeps the size of the
            gradient independent of T (Hinton, Vinyals and Dean, arXiv:1503.02531, section 2).
        beta: the teacher's share of the mixture, for `jsd`.
        ce_weight: share of the cross-entropy with the labels, from 0 to 1, always at temperature 1.

    Raises:
        ValueError: for a value outside its range.
    """

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta} must be between 0 and 1, both excluded; "
                "the limits are kind='forward_kl' (0) and kind='reverse_kl' (1)"
            )
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight={self.ce_weight} must be from 0 to 1")

    @property
    def kl_factor(self) -> float:
        """What the divergence of a token is multiplied with: (1 − ce_weight) · T²."""
        return (1 - self.ce_weight) * self.temperature**2
