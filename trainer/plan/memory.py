"""Memory of a rank in training, by part: one model for every engine.

Notation: p processes, c bytes of the compute dtype (2 for bf16, 4 for fp32). Weights are kept in fp32 and
cast for computing (autocast, FSDP2's mixed precision); DeepSpeed in bf16 keeps bf16 weights and gradients,
and an fp32 master copy in the optimizer, which adds up to the same 16 bytes a trained weight (ZeRO,
arXiv:1910.02054, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from qatapult.trainer.plan.hardware import Cluster
from qatapult.trainer.plan.model_shape import ModelShape
from qatapult.trainer.plan.settings import Setting, largest_micro_batch
from qatapult.trainer.recipe.schema import Recipe

FP32 = 4


@dataclass(frozen=True)
class Assumptions:
    """Constants of the model that calibration may replace. Bytes, unless they say otherwise.

    Attributes:
        runtime_gpu: driver context, cuBLAS workspaces and NCCL's channels of a GPU process.
        runtime_cpu: interpreter and libraries of a CPU process.
        fragmentation: share of the allocator's memory that is lost between blocks.
        loss_chunk_tokens: tokens whose logits the fused loss holds at a time.
        bucket: communication bucket of DDP and ZeRO.
        prefetched_blocks: gathered blocks that FSDP2 or ZeRO-3 hold at a time.
        saved_scale: factor on activations, from calibration.
    """

    runtime_gpu: float = 1.2e9
    runtime_cpu: float = 0.65e9
    fragmentation: float = 0.03
    loss_chunk_tokens: int = 1024
    bucket: float = 25e6
    prefetched_blocks: int = 2
    saved_scale: float = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of a rank, by part, and bytes in main memory of a rank."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    quantized_weights: float
    activations: float
    loss: float
    communication: float
    runtime: float
    host: float = field(default=0.0)

    @property
    def device(self) -> float:
        """All parts on the device together."""
        return sum(self.parts.values())

    @property
    def parts(self) -> Mapping[str, float]:
        """Name of the part to its bytes on the device."""
        return {name: value for name, value in asdict(self).items() if name != "host"}


def compute_bytes(recipe: Recipe, cluster: Cluster) -> int:
    """Bytes of the dtype that matrices are multiplied in."""
    precision = recipe.qat.precision
    if precision == "auto":
        precision = "fp32" if cluster.gpu.is_cpu else "bf16"
    return FP32 if precision == "fp32" else 2


def trained_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Weights with a gradient. Scales count only where they alone are trained."""
    if recipe.qat.trainable == "all":
        return shape.parameters
    if recipe.qat.trainable == "linears":
        return shape.linear_parameters
    if recipe.qat.trainable == "lora":
        features = sum(rows + columns for rows, columns in shape.linears.values())
        return shape.layers * features * recipe.qat.lora_rank
    return scale_parameters(recipe, shape)


def scale_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Scales of all quantized linears."""
    if recipe.quantization.weights is None:
        return 0
    scheme = recipe.quantization.weights.scheme
    per_block = 0
    for rows, columns in shape.linears.values():
        blocks_a_row = columns / scheme.group_size if scheme.group_size else 1
        per_block += 1 if scheme.granularity == "tensor" else round(rows * blocks_a_row)
    return shape.layers * per_block


def memory(
    recipe: Recipe, shape: ModelShape, cluster: Cluster, setting: Setting, given: Assumptions | None = None
) -> Memory:
    """Peak memory of one rank in a training step.

    The peak is either where the backward pass begins (all activations and the loss are alive, gradients only
    if they are being accumulated) or where it ends (all gradients, one block's activations): the higher one.
    """
    given = given or Assumptions()
    c = compute_bytes(recipe, cluster)
    p = cluster.world
    trained = trained_parameters(recipe, shape)
    frozen = shape.parameters - (trained if recipe.qat.trainable != "lora" else 0)
    gradients, state = _training_state(recipe, cluster, setting, trained)
    weights = weight_bytes(setting, c) * (trained + frozen) / (p if setting.shards_weights else 1)
    host = state if setting.offload != "none" else 0.0
    if setting.offload == "parameters":
        host, weights = host + weights, 0.0
    activations = _activations(shape, setting, recipe.data.block_size, c) * given.saved_scale
    one_block = activations / shape.layers
    loss = _loss(recipe, shape, setting, given)
    accumulates = largest_micro_batch(recipe, cluster) > setting.micro_batch or setting.engine.startswith(
        "zero"
    )
    begin = activations + loss + (gradients if accumulates else 0.0)
    end = gradients + one_block
    at_end = end > begin
    total = {
        "weights": weights,
        "gradients": gradients if at_end or accumulates else 0.0,
        "optimizer": 0.0 if setting.offload != "none" else state,
        "teacher": _teacher(shape, setting, c, p),
        "quantized_weights": _quantized_weights(recipe, shape, setting, c),
        "activations": one_block if at_end else activations,
        "loss": 0.0 if at_end else loss,
        "communication": _communication(shape, setting, trained, p, c, given),
    }
    runtime = given.runtime_cpu if cluster.gpu.is_cpu else given.runtime_gpu
    return Memory(**total, runtime=runtime + given.fragmentation * sum(total.values()), host=host)


def weight_bytes(setting: Setting, compute: int) -> int:
    """Bytes of a stored weight: bf16 in DeepSpeed (its fp32 copy counts as optimizer state), else fp32."""
    return 2 if setting.engine.startswith("zero") and compute == 2 else FP32


def _training_state(recipe: Recipe, cluster: Cluster, setting: Setting, trained: int) -> tuple[float, float]:
    """Bytes of a rank's gradients and of its optimizer states."""
    stored = weight_bytes(setting, compute_bytes(recipe, cluster))
    state = 8 if stored == FP32 else 12
    gradients = stored * trained / (cluster.world if setting.shards_gradients else 1)
    return gradients, state * trained / (cluster.world if setting.shards_optimizer else 1)


def saved_bytes_per_token(shape: ModelShape, compute: int) -> float:
    """Bytes a token and block that the forward pass keeps for the backward pass.

    Counted from transformers' LLaMA block with scaled-dot-product attention and our quantized linears. The
    residual stream is fp32 (fp32 embeddings and autocast); what linears read and write has the compute dtype.
    """
    h, f, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.kv_width
    norms = 2 * (2 * FP32 * h)  # each norm keeps its input and the normalized input, in fp32
    linear_inputs = compute * (h + q + h + f)  # q/k/v share one, gate/up share one
    quantized_inputs = compute * (
        3 * h + q + 2 * h + f
    )  # the integer grid's values, for the weights' gradients
    attention = compute * (2 * q + 2 * kv)  # rotated queries and keys, values, output
    gate = compute * 3 * f  # gate, its activation, and up
    return norms + linear_inputs + quantized_inputs + attention + gate


def _teacher(shape: ModelShape, setting: Setting, c: int, p: int) -> float:
    if setting.teacher in ("none", "cached"):
        return 0.0
    whole = c * shape.parameters
    if setting.teacher == "whole":
        return whole
    return whole / p + c * shape.block_parameters


def _quantized_weights(recipe: Recipe, shape: ModelShape, setting: Setting, c: int) -> float:
    """Weights on their grid in the compute dtype, kept for the inputs' gradients; one block's if recomputed.

    Where weights are stored in fp32 and multiplied in bf16, autocast keeps such copies even without
    quantization.
    """
    casts = weight_bytes(setting, c) != c
    if recipe.quantization.weights is None and not casts:
        return 0.0
    blocks = 1 if setting.checkpointing or setting.shards_weights else shape.layers
    return c * shape.block_linear_parameters * blocks + (c * shape.head_parameters if casts else 0)


def _activations(shape: ModelShape, setting: Setting, block_size: int, c: int) -> float:
    tokens = setting.micro_batch * block_size
    block = saved_bytes_per_token(shape, c)
    if setting.checkpointing:
        return tokens * (shape.layers * FP32 * shape.hidden + block)
    return tokens * shape.layers * block


def _loss(recipe: Recipe, shape: ModelShape, setting: Setting, given: Assumptions) -> float:
    """A chunk's logits (student, teacher, gradient) and all hidden states, in fp32."""
    tokens = setting.micro_batch * recipe.data.block_size
    chunk = min(tokens, given.loss_chunk_tokens)
    logits = 3 * FP32 * chunk * shape.vocabulary
    return logits + 3 * FP32 * tokens * shape.hidden


def _communication(
    shape: ModelShape, setting: Setting, trained: int, p: int, c: int, given: Assumptions
) -> float:
    if p == 1 and setting.offload == "none":
        return 0.0
    if setting.engine == "ddp":
        return FP32 * trained  # the buckets are a copy of all gradients
    if setting.shards_weights:
        gathered = given.prefetched_blocks * c * shape.block_parameters
        whole = c * shape.head_parameters  # embeddings or head, gathered for the loss
        return gathered + whole + FP32 * shape.block_parameters
    return 2 * given.bucket * FP32
