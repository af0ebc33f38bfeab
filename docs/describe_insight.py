"""Write what `qatapult insight` found into docs/insight.md: python docs/describe_insight.py runs/NAME."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatapult.trainer.report.inside import describe
from qatapult.trainer.report.summary import summarize
from qatapult.trainer.report.text import number
from qatapult.trainer.run_folder import RunFolder

PAGE = Path(__file__).parent / "insight.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main(folder: Path) -> None:
    run = RunFolder(folder.absolute())
    found = json.loads((run.path / "insight.json").read_text(encoding="utf-8"))
    text = "\n".join(section(summarize(run), found))
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def section(report: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """The lines of the section: which run, the claims, the sentences, and the layers that cost most."""
    metric, training = report["metrics"]["perplexity"], report["training"]
    source = report["recipe"]["model"]["source"].rpartition("/")[2]
    full, ptq, packed = (number(metric[key]) for key in ("full_precision", "ptq", "packed"))
    yield (
        f"Run `{report['name']}`: {source} to {report['format']}, {training['tokens']:,} tokens of training; "
        f"perplexity {full} at full precision, {ptq} after round-to-nearest, {packed} as packed integers "
        f"after training. Looked at on {found['tokens']:,} held-out tokens."
    )
    yield from ("", "| what is said of QAT | full precision → PTQ → QAT | here |", "|---|---|---|")
    for claim in found["claims"]:
        yield f"| {claim['claim']} | {describe(claim)} | {claim['verdict']} |"
    for part, sentence in found["sentences"].items():
        yield from ("", f"**{part.capitalize()}.** {sentence}")
    if found.get("scales"):
        yield from ("", "| what costs most | layers | perplexity without its quantization |", "|---|---|---|")
        for group in found["scales"]["ablation"]["groups"][:8]:
            if group["cost"] > 0:
                yield f"| {group['name']} | {group['layers']} | {number(group['perplexity'])} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
