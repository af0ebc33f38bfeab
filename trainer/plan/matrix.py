"""The decision matrix: what to do first, by where the model is served and how many bits its weights have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scenario = Literal["cloud", "edge", "mobile", "research"]
Action = Literal["ship PTQ", "PTQ, then decide", "train", "train, mixed precision", "smaller model first"]

SCENARIOS: dict[Scenario, str] = {
    "cloud": "served at scale from data-centre GPUs; cost a token decides",
    "edge": "one accelerator beside the machine it serves; latency and memory decide",
    "mobile": "a phone or a laptop; memory and energy decide, 4 bits are a must",
    "research": "the question is how far bits can go; accuracy decides",
}


@dataclass(frozen=True)
class Cell:
    """One cell: what to do, and why."""

    action: Action
    why: str


_PTQ_8 = Cell("ship PTQ", "8-bit weights lose 2–3 % of perplexity at most; training has little to win back")
_MATRIX: dict[tuple[Scenario, int], Cell] = {
    ("cloud", 8): _PTQ_8,
    ("edge", 8): _PTQ_8,
    ("mobile", 8): Cell("ship PTQ", "8 bits lose little, but half of the memory is wasted: look at 4"),
    ("research", 8): Cell("PTQ, then decide", "a baseline for lower bits; train only to close the last 2 %"),
    ("cloud", 4): Cell(
        "PTQ, then decide",
        "GPTQ or AWQ may do; training pays if the volume is large and PTQ misses the tolerance",
    ),
    ("edge", 4): Cell(
        "train", "integer-only accelerators need W4A8, where PTQ loses most and training wins most"
    ),
    ("mobile", 4): Cell(
        "train", "4 bits are given, models are small and lose more, and every user has the loss"
    ),
    ("research", 4): Cell(
        "PTQ, then decide", "the best PTQ is the baseline to beat; both belong in the table"
    ),
    ("cloud", 3): Cell(
        "train, mixed precision", "PTQ breaks down at 3 bits; keep the sensitive 5 % in 8 bits"
    ),
    ("edge", 3): Cell(
        "train, mixed precision", "PTQ breaks down at 3 bits; keep the sensitive 5 % in 8 bits"
    ),
    ("mobile", 3): Cell(
        "train, mixed precision", "PTQ breaks down at 3 bits; check that the runtime has the kernel"
    ),
    ("research", 3): Cell("train", "recoveries from 68 % upward are published at 3 to 4 bits"),
    ("cloud", 2): Cell("smaller model first", "a 4-bit model of half the size is the rival at equal memory"),
    ("edge", 2): Cell("smaller model first", "a 4-bit model of half the size is the rival at equal memory"),
    ("mobile", 2): Cell("train", "where nothing else fits: block by block first, then end to end"),
    ("research", 2): Cell("train", "block by block first, then end to end (EfficientQAT, ParetoQ)"),
}


def cell(scenario: Scenario, weight_bits: float) -> Cell:
    """The matrix's answer; ternary and binary weights are in the row of 2 bits."""
    row = min((8, 4, 3, 2), key=lambda bits: abs(bits - max(weight_bits, 2)))
    return _MATRIX[scenario, row]


def rows() -> list[tuple[Scenario, int, Cell]]:
    """The whole matrix."""
    return [(scenario, bits, found) for (scenario, bits), found in _MATRIX.items()]
