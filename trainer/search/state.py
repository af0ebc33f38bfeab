"""A search is a folder: what was measured survives, and the same command goes on where it stopped."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_json

_FILE = "state.json"


@dataclass
class SearchState:
    """Measurements of a search.

    Attributes:
        folder: where `state.json` is.
        question: what the measurements depend on (model, grids, text); another question is refused.
        estimates: measure to costs `[groups][candidates]`, for the estimated measures.
        changes: `group name|candidate name` to the divergence with that one change, nats a token.
        assignments: candidate indices joined by `,` to the measured divergence of the whole assignment.
        judgements: likewise, on the text that finalists are measured on.
        seconds: time spent so far.
    """

    folder: Path
    question: dict[str, Any]
    estimates: dict[str, list[list[float]]] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    assignments: dict[str, float] = field(default_factory=dict)
    judgements: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._opened, self._before = time.monotonic(), self.seconds

    def save(self) -> None:
        """Write the state atomically, with the time spent until now."""
        self.seconds = self._before + time.monotonic() - self._opened
        write_json(
            self.folder / _FILE,
            {
                "question": self.question,
                "estimates": self.estimates,
                "changes": self.changes,
                "assignments": self.assignments,
                "judgements": self.judgements,
                "seconds": self.seconds,
            },
        )

    def assignment(self, choice: list[int]) -> float | None:
        """The measured divergence of a whole assignment, if there is one."""
        return self.assignments.get(_key(choice))

    def remember(self, choice: list[int], value: float) -> None:
        """Keep the measured divergence of a whole assignment."""
        self.assignments[_key(choice)] = value
        self.save()

    def judgement(self, choice: list[int]) -> float | None:
        """The divergence of a finalist on the other text, if it was measured."""
        return self.judgements.get(_key(choice))

    def judge(self, choice: list[int], value: float) -> None:
        """Keep the divergence of a finalist on the other text."""
        self.judgements[_key(choice)] = value
        self.save()

    def measured(self) -> list[tuple[list[int], float]]:
        """All measured assignments."""
        return [([int(part) for part in key.split(",")], value) for key, value in self.assignments.items()]


def open_state(folder: Path, question: dict[str, Any]) -> SearchState:
    """Open a search's folder, or begin one.

    Args:
        folder: created when something is first saved.
        question: plain JSON types.

    Raises:
        UserError: if the folder holds the measurements of another question, or is damaged.
    """
    file = folder / _FILE
    if not file.exists():
        return SearchState(folder, question)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        state = SearchState(folder, **stored)
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it to search anew") from None
    for name, value in question.items():
        if state.question.get(name) != value:
            raise UserError(
                f"{folder} holds a search with another {name} ({_short(state.question.get(name))}, now "
                f"{_short(value)}); give another --folder"
            )
    return state


def _key(choice: list[int]) -> str:
    return ",".join(map(str, choice))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
