"""Questions about the held-out part of the language reference, made when they are asked.

The reference comes with the running Python, so that these tasks need no network. They ask about the documents
that `cpython_docs` holds out from training by default (the first of every eight).
"""

from __future__ import annotations

import random
import re
from typing import Any

import datasets

from qatapult.trainer.data.documents import read_documents, split_documents
from qatapult.trainer.recipe.schema import Data, DataSource

_CONTEXT = 400  # characters before the question: about 100 tokens
_CHOICES = 4
_SENTENCE = re.compile(r"(?<=[.:])\s+(?=[A-Z*“\"])")


def cloze(**_: Any) -> dict[str, datasets.Dataset]:
    """The last word of a sentence, where it occurred before in its document: as LAMBADA (arXiv:1606.06031).

    Columns: `context`, which ends before a space, and `word`.
    """
    rows = []
    for document in _held_out():
        for start, sentence in _sentences(document):
            context, _, last = sentence.rpartition(" ")
            word = last.rstrip(".:")
            if len(word) >= 4 and word.isalpha() and word in document[:start]:
                rows.append({"context": document[max(0, start - _CONTEXT) : start] + context, "word": word})
    return _test_split(rows)


def choice(**_: Any) -> dict[str, datasets.Dataset]:
    """Which of four sentences comes next; the wrong ones come from elsewhere in the held-out documents.

    Columns: `context`, `choices` (a list) and `label` (index of the right one).
    """
    draw = random.Random(0)
    documents = _held_out()
    everything = [sentence for document in documents for _, sentence in _sentences(document)]
    rows = []
    for document in documents:
        for start, sentence in _sentences(document):
            if start < _CONTEXT // 4:
                continue
            others = [other for other in everything if other != sentence]
            # Of like length, so that length alone does not give the answer away.
            others.sort(key=lambda other: abs(len(other) - len(sentence)))
            wrong = draw.sample(others[:20], _CHOICES - 1)
            label = draw.randrange(_CHOICES)
            choices = [*wrong[:label], sentence, *wrong[label:]]
            context = document[max(0, start - _CONTEXT) : start].rstrip()
            rows.append({"context": context, "choices": choices, "label": label})
    return _test_split(rows)


def text(**_: Any) -> dict[str, datasets.Dataset]:
    """The documents themselves. Column: `text`."""
    return _test_split([{"text": document} for document in _held_out()])


def _held_out() -> list[str]:
    documents = read_documents(DataSource(kind="cpython_docs"))
    _, held_out = split_documents(documents, Data().held_out_every)
    return held_out


def _sentences(document: str) -> list[tuple[int, str]]:
    """Sentences of prose with their places: one paragraph each, of 8 words or more."""
    found = []
    for paragraph in re.finditer(r"(?:^|\n\n)(\w.*?)(?=\n\n|\Z)", document, re.DOTALL):
        start = paragraph.start(1)
        for sentence in _SENTENCE.split(paragraph.group(1)):
            place = document.index(sentence, start)
            start = place + len(sentence)
            flat = " ".join(sentence.split())
            if len(flat.split()) >= 8 and "***" not in flat and "===" not in flat:
                found.append((place, flat))
    return found


def _test_split(rows: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(rows)}
