"""llama.cpp, through xllamacpp, as the judge of a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from torch.nn.functional import cross_entropy

from qatapult.trainer.recipe.errors import UserError

_CHUNK = 64


class LlamaCpp:
    """A GGUF file loaded by llama.cpp.

    llama.cpp computes everything below the output head; its server hands out the final hidden states of every
    token, but logits of the last one alone. The head, which the file keeps in floating point, is applied
    here.

    Args:
        file: the GGUF file.
        context: most tokens of a sequence.
        threads: CPU threads; those of torch by default.
    """

    def __init__(self, file: Path, context: int = 4096, threads: int | None = None) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise UserError("loading GGUF needs llama.cpp: pip install xllamacpp") from None
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.embedding = True
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        parameters.embd_normalize = -1
        parameters.n_ctx = context
        parameters.n_batch = context
        parameters.fit_params = False
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = 0
        parameters.cpuparams.n_threads = threads or torch.get_num_threads()
        parameters.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        self._server = xllamacpp.Server(parameters)
        self._head = _head(file)

    def hidden_states(self, ids: list[int]) -> Tensor:
        """Hidden states after the final norm, fp32 `[T, D]`."""
        # The server's own form of the request: the one after OpenAI's has no vectors of single tokens.
        request = urllib.request.Request(
            f"{self._server.listening_address}/embedding",
            json.dumps({"content": ids}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return torch.tensor(json.load(reply)[0]["embedding"])

    def token_losses(self, ids: Tensor) -> Tensor:
        """Next-token losses, fp32 `[B, S]` to `[B, S − 1]`."""
        losses = []
        for sequence in ids:
            hidden = self.hidden_states(sequence.tolist())[:-1]
            parts = [
                cross_entropy(rows @ self._head.T, goal, reduction="none")
                for rows, goal in zip(hidden.split(_CHUNK), sequence[1:].split(_CHUNK), strict=True)
            ]
            losses.append(torch.cat(parts))
        return torch.stack(losses)


def _head(file: Path) -> Tensor:
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return torch.from_numpy(dequantize(head.data, head.tensor_type).copy()).float()
