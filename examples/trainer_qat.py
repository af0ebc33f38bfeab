"""Quantization-aware training in a plain transformers `Trainer`: the function `add_qat` is all that is new.

    python examples/trainer_qat.py [FOLDER_OF_A_CAUSAL_LM] [--steps 30]

Without a folder, a small randomly initialised Llama learns to count, to 4-bit weights in groups of 32 with
learned scales and 8-bit activations. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from qatapult.kernels import Scheme, choose_range, fake_quantize, fake_quantize_dynamic

WEIGHTS = Scheme(bits=4, granularity="group", group_size=32)
ACTIVATIONS = Scheme(bits=8, granularity="token")


class FakeQuantized(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(choose_range(weight, WEIGHTS)[0])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return fake_quantize(weight, self.scale, scheme=WEIGHTS)


def add_qat(model: torch.nn.Module) -> None:
    for layer in filter(lambda module: isinstance(module, torch.nn.Linear), list(model.model.modules())):
        parametrize.register_parametrization(layer, "weight", FakeQuantized(layer.weight))
        layer.register_forward_pre_hook(lambda _, inputs: (fake_quantize_dynamic(inputs[0], ACTIVATIONS),))


def counting(vocabulary: int, length: int = 32, examples: int = 512) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from a random number."""
    starts = torch.randint(vocabulary, (examples, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(length)) % vocabulary]


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    """Train, and return the model with its losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of a causal language model with Linear layers")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    add_qat(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-3 if not options.model else 1e-5,
            logging_steps=max(1, options.steps // 6),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=counting(min(64, model.config.vocab_size)))
        trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
