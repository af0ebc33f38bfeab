"""What quantization does to activations: ranges, outlier channels, clipping, information lost, sinks.

Massive activations are few values in the residual stream that are thousands of times larger than the rest, at
fixed channels and mostly at the first token (Sun et al., Massive Activations in Large Language Models,
arXiv:2402.17762); attention sinks are tokens, mostly the first, that attention falls on without need (Xiao et
al., arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.kernels import Scheme, fake_quantize_dynamic
from qatapult.trainer.evaluate.perplexity import decoder, last_hidden
from qatapult.trainer.quantize.modules import QuantizedWeight

#: A channel is an outlier if its largest magnitude is so many times the median channel's.
OUTLIER = 6.0
#: Massive: above 100 and 1000 times the median magnitude (arXiv:2402.17762, section 2).
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
#: Share of magnitudes that a static range, fixed once on the full-precision model, leaves outside.
STATIC_OUTSIDE = 0.001
_SAMPLE = 50_000


@dataclass(frozen=True)
class LayerActivations:
    """The inputs of one linear layer.

    Attributes:
        absmax: largest magnitude.
        crest: mean over tokens of (largest magnitude / root mean square): how far a token's outlier stretches
            its scale.
        outlier_channels: share of input channels that are outliers.
        worst_channel: index of the channel with the largest magnitude.
        worst_ratio: its largest magnitude, relative to the median channel's.
        clipped: share outside the range of the grid that is in force; 0 where each token's range fits its
            values.
        beyond_static: share outside a static range that was fixed on the full-precision model.
        sqnr_db: signal-to-quantization-noise ratio of the inputs on their grid, in decibels; None without a
            grid.
        static_range: magnitude that all but `STATIC_OUTSIDE` of these inputs stay below.
    """

    absmax: float
    crest: float
    outlier_channels: float
    worst_channel: int
    worst_ratio: float
    clipped: float
    beyond_static: float
    sqnr_db: float | None
    static_range: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Collector:
    """Sums over the batches of one layer's inputs."""

    def __init__(self, scheme: Scheme | None, static_range: float | None) -> None:
        self.scheme, self.static_range = scheme, static_range
        self.channels: Tensor | None = None
        self.crest = self.tokens = self.outside = self.clipped = self.values = 0.0
        self.signal = self.noise = 0.0
        self.samples: list[Tensor] = []

    def add(self, x: Tensor, layer: nn.Module) -> None:
        rows = x.detach().float().flatten(0, -2)
        magnitudes = rows.abs()
        largest = magnitudes.amax(dim=0)
        self.channels = largest if self.channels is None else torch.maximum(self.channels, largest)
        root_mean_square = rows.square().mean(dim=1).sqrt().clamp(min=1e-12)
        self.crest += float((magnitudes.amax(dim=1) / root_mean_square).sum())
        self.tokens += len(rows)
        self.values += rows.numel()
        flat = magnitudes.flatten()
        self.samples.append(flat[:: max(1, len(flat) // _SAMPLE)].cpu())
        if self.static_range is not None:
            self.outside += float((magnitudes > self.static_range).sum())
        clip = getattr(layer, "activation_clip", None)
        if clip is not None:
            self.clipped += float((magnitudes > clip).sum())
        if self.scheme is not None:
            error = fake_quantize_dynamic(rows, self.scheme) - rows
            self.signal += float(rows.double().square().sum())
            self.noise += float(error.double().square().sum())

    def result(self) -> LayerActivations:
        assert self.channels is not None
        worst = int(self.channels.argmax())
        median = float(self.channels.median().clamp(min=1e-12))
        ordered = torch.cat(self.samples).sort().values
        own_range = float(ordered[int((1 - STATIC_OUTSIDE) * (len(ordered) - 1))])
        decibels = None
        if self.scheme is not None and self.noise > 0:
            decibels = float(10 * torch.log10(torch.tensor(self.signal / self.noise, dtype=torch.float64)))
        return LayerActivations(
            absmax=float(self.channels.max()),
            crest=self.crest / self.tokens,
            outlier_channels=float((self.channels > OUTLIER * median).float().mean()),
            worst_channel=worst,
            worst_ratio=float(self.channels[worst]) / median,
            clipped=self.clipped / self.values,
            beyond_static=self.outside / self.values if self.static_range is not None else STATIC_OUTSIDE,
            sqnr_db=decibels,
            static_range=own_range,
        )


@torch.no_grad()
def layer_activations(
    model: PreTrainedModel,
    blocks: Tensor,
    schemes: Mapping[str, Scheme | None],
    static_ranges: Mapping[str, float] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, LayerActivations]:
    """Measure the inputs of linear layers.

    Args:
        model: a causal language model; quantized layers see their inputs before they are quantized.
        blocks: token ids, int64 `[blocks, S]`.
        schemes: the layers to measure, with the grid of their inputs (also for the full-precision model: what
            the grid would do to its inputs).
        static_ranges: `static_range` of each layer in the full-precision model, for `beyond_static`.
        on_progress: called with the number of blocks done.
    """
    collectors = {
        name: _Collector(scheme, static_ranges[name] if static_ranges else None)
        for name, scheme in schemes.items()
    }
    with _watching(model, collectors):
        for done, block in enumerate(blocks, start=1):
            last_hidden(model, block[None].to(model.device))
            if on_progress:
                on_progress(done)
    return {name: collector.result() for name, collector in collectors.items()}


@torch.no_grad()
def massive_activations(model: PreTrainedModel, blocks: Tensor) -> list[dict[str, Any]]:
    """The massive activations of the residual stream, one entry a channel, largest first.

    Returns:
        `[{"channel", "value", "layers": [first, last], "tokens": share that are first tokens}]`.
    """
    found: dict[int, dict[str, Any]] = {}
    for block in blocks:
        output = decoder(model)(
            input_ids=block[None].to(model.device), use_cache=False, output_hidden_states=True
        )
        for depth, hidden in enumerate(output.hidden_states[1:-1]):
            magnitudes = hidden[0].float().abs()
            limit = max(MASSIVE, MASSIVE_RATIO * float(magnitudes.median()))
            for token, channel in (magnitudes > limit).nonzero().tolist():
                entry = found.setdefault(
                    channel,
                    {"channel": channel, "value": 0.0, "layers": [depth, depth], "first": 0, "count": 0},
                )
                entry["value"] = max(entry["value"], float(magnitudes[token, channel]))
                entry["layers"] = [min(entry["layers"][0], depth), max(entry["layers"][1], depth)]
                entry["first"] += token == 0
                entry["count"] += 1
    result = sorted(found.values(), key=lambda entry: -entry["value"])
    return [{**entry, "at_first_token": entry.pop("first") / entry.pop("count")} for entry in result]


@torch.no_grad()
def attention_sinks(model: PreTrainedModel, blocks: Tensor, first_query: int = 16) -> list[float]:
    """Share of attention on the first token, by layer: mean over heads and queries from `first_query` on."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused ones do not give the weights
    try:
        shares: Tensor | None = None
        for block in blocks:
            output = decoder(model)(
                input_ids=block[None].to(model.device), use_cache=False, output_attentions=True
            )
            here = torch.stack(
                [weights[0, :, first_query:, 0].float().mean() for weights in output.attentions]
            )
            shares = here if shares is None else shares + here
        assert shares is not None
        return (shares / len(blocks)).tolist()
    finally:
        model.set_attn_implementation(implementation)


def total(layers: Iterable[LayerActivations]) -> dict[str, float | None]:
    """Means over layers."""
    entries = list(layers)
    names = ("crest", "outlier_channels", "worst_ratio", "clipped", "beyond_static", "sqnr_db")
    means: dict[str, float | None] = {}
    for name in names:
        values = [value for entry in entries if (value := getattr(entry, name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return {**means, "absmax": max(entry.absmax for entry in entries)}


def input_schemes(layers: Mapping[str, QuantizedWeight]) -> dict[str, Scheme | None]:
    """The grid of each linear layer's inputs."""
    return {name: layer.activation_scheme for name, layer in layers.items() if isinstance(layer, nn.Linear)}


@contextmanager
def _watching(model: nn.Module, collectors: Mapping[str, _Collector]) -> Iterator[None]:
    handles = []
    for name, collector in collectors.items():
        layer = model.get_submodule(name)

        def see(module: nn.Module, inputs: tuple[Tensor, ...], collector: _Collector = collector) -> None:
            collector.add(inputs[0], module)

        handles.append(layer.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
