"""Memory of a rank in training, by part: one model for every engine.

Notation: p processes, c bytes of the compute dtype (2 for bf16, 4 for fp32). Every engine keeps and gathers weights in
fp32, so that they lie on the grid that is packed, and casts them for computing by autocast: 16 bytes a trained weight
with its gradient and AdamW's moments, as in mixed precision (ZeRO, arXiv:1910.02054, section 3.1). ZeRO-1 and 2
update a copy of their share of the weights, 4 bytes more of what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from qatapult.trainer.plan.hardware import Cluster, processor_flags
from qatapult.trainer.plan.model_shape import ModelShape
from qatapult.trainer.plan.settings import Setting, micro_steps
from qatapult.trainer.recipe.schema import Recipe

FP32 = 4


@dataclass(frozen=True)
class Assumptions:
    """Constants of the model that calibration may replace. Bytes, unless they say otherwise.

    Attributes:
        runtime_gpu: driver context, cuBLAS workspaces and NCCL's channels of a GPU process.
        runtime_cpu: interpreter and libraries of a CPU process.
        fragmentation: share of the allocator's memory that is lost between blocks.
        loss_budget_gpu: bytes of logits that the fused loss holds at a time, student and teacher together.
        loss_budget_cpu: likewise on a CPU.
        bucket: elements of a reduction bucket of ZeRO (`configs/deepspeed/`); with overlap there are two.
        prefetched_blocks: gathered blocks that FSDP2 or ZeRO-3 hold at a time.
        saved_scale: factor on activations, from calibration.
    """

    runtime_gpu: float = 1.2e9
    runtime_cpu: float = 0.65e9
    fragmentation: float = 0.03
    loss_budget_gpu: float = 1280 * 2**20
    loss_budget_cpu: float = 96 * 2**20
    bucket: float = 2e8
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
        has_bf16 = not cluster.gpu.is_cpu or {"avx512_bf16", "amx_bf16"} & processor_flags()
        precision = "bf16" if has_bf16 else "fp32"
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
    gradients, state = _training_state(cluster, setting, trained)
    weights = FP32 * (trained + frozen) / (p if setting.shards_weights else 1)
    host = state if setting.offload != "none" else 0.0
    if setting.offload == "parameters":
        host, weights = host + weights, 0.0
    activations = _activations(recipe, shape, cluster, setting) * given.saved_scale
    one_block = activations / shape.layers
    loss = _loss(recipe, shape, cluster, setting, given)
    accumulates = micro_steps(recipe, cluster, setting) > 1 or setting.engine.startswith("zero")
    begin = activations + loss + (gradients if accumulates else 0.0)
    end = gradients + one_block
    at_end = end > begin
    total = {
        "weights": weights,
        "gradients": gradients if at_end or accumulates else 0.0,
        "optimizer": 0.0 if setting.offload != "none" else state,
        "teacher": _teacher(shape, setting, c, p),
        "quantized_weights": _quantized_weights(recipe, shape, cluster, setting),
        "activations": one_block if at_end else activations,
        "loss": 0.0 if at_end else loss,
        "communication": _communication(shape, setting, trained, p, given),
    }
    runtime = given.runtime_cpu if cluster.gpu.is_cpu else given.runtime_gpu
    return Memory(**total, runtime=runtime + given.fragmentation * sum(total.values()), host=host)


def _training_state(cluster: Cluster, setting: Setting, trained: int) -> tuple[float, float]:
    """Bytes of a rank's gradients and optimizer states; these hold a copy of the weights where DeepSpeed makes one."""
    copies = setting.engine in ("zero1", "zero2") or (setting.engine == "zero3" and setting.offload != "none")
    state = 12 if copies else 8
    gradients = FP32 * trained / (cluster.world if setting.shards_gradients else 1)
    return gradients, state * trained / (cluster.world if setting.shards_optimizer else 1)


def saved_bytes_per_token(recipe: Recipe, shape: ModelShape, cluster: Cluster) -> float:
    """Bytes a token and block that the forward pass keeps for the backward pass.

    Counted by the tensors that autograd saves in transformers' LLaMA block with scaled-dot-product attention
    and our quantized linears; a test counts them again.
    """
    c = compute_bytes(recipe, cluster)
    h, f, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.kv_width
    kept_by_norm = (
        2 if recipe.qat.trainable == "all" else 1
    )  # its input, and what its weight is multiplied with
    norms = 2 * kept_by_norm * FP32 * h
    if keeps_quantized_values(recipe, cluster):
        inputs = 5 * h + q + f  # every linear's own quantized input
    elif autocasts(recipe, cluster):
        inputs = 5 * h + f  # every linear's own cast of the fp32 norm; attention's output is not cast
    else:
        inputs = 2 * h + f
    attention = c * (2 * q + 2 * kv)  # rotated queries and keys, values, output
    if composes_attention(recipe, cluster):
        attention += c * shape.heads * recipe.data.block_size  # probabilities
    else:
        attention += FP32 * shape.heads  # their normalizers
    return norms + attention + c * (inputs + 3 * f) + 2 * FP32


def composes_attention(recipe: Recipe, cluster: Cluster) -> bool:
    """Whether training attends by products, as on CPUs up to some length, and keeps the probabilities."""
    if not cluster.gpu.is_cpu:
        return False
    from qatapult.trainer.loop.attention import LONGEST

    return recipe.data.block_size <= LONGEST


def keeps_quantized_values(recipe: Recipe, cluster: Cluster) -> bool:
    """Whether fake-quantized weights and inputs are kept for the backward pass.

    A CPU computes them again in the backward pass; a GPU does so for the integer forward alone, which `auto` does not
    take there (`kernels.quantized_linear`).
    """
    weights, activations = recipe.quantization.weights, recipe.quantization.activations
    if weights is None:
        return False
    if cluster.gpu.is_cpu:
        return activations is not None and activations.range != "minmax"
    return activations is None or recipe.qat.integer_forward is not True


def autocasts(recipe: Recipe, cluster: Cluster) -> bool:
    """Whether fp32 weights are multiplied in 16 bits, so that every layer casts its inputs."""
    return compute_bytes(recipe, cluster) == 2


def _teacher(shape: ModelShape, setting: Setting, c: int, p: int) -> float:
    if setting.teacher in ("none", "cached"):
        return 0.0
    whole = c * shape.parameters
    if setting.teacher == "whole":
        return whole
    return whole / p + c * shape.block_parameters


def _quantized_weights(recipe: Recipe, shape: ModelShape, cluster: Cluster, setting: Setting) -> float:
    """Weights on their grid, or cast, in the compute dtype: of every block, or of the recomputed one."""
    c = compute_bytes(recipe, cluster)
    casts = autocasts(recipe, cluster)
    head = c * shape.head_parameters if casts else 0
    if keeps_quantized_values(recipe, cluster) or (casts and recipe.quantization.weights is None):
        blocks = 1 if setting.checkpointing or setting.shards_weights else shape.layers
        return c * shape.block_linear_parameters * blocks + head
    return 2 * c * max(rows * columns for rows, columns in shape.linears.values()) + head


def _activations(recipe: Recipe, shape: ModelShape, cluster: Cluster, setting: Setting) -> float:
    tokens = setting.micro_batch * recipe.data.block_size
    block = saved_bytes_per_token(recipe, shape, cluster)
    if setting.checkpointing:
        return tokens * (shape.layers * FP32 * shape.hidden + block)
    return tokens * shape.layers * block


def _loss(recipe: Recipe, shape: ModelShape, cluster: Cluster, setting: Setting, given: Assumptions) -> float:
    """A chunk's logits of student and teacher, and the last hidden states of both with their gradient."""
    c = compute_bytes(recipe, cluster)
    tokens = setting.micro_batch * recipe.data.block_size
    budget, least = (given.loss_budget_cpu, 64) if cluster.gpu.is_cpu else (given.loss_budget_gpu, 512)
    row = 2 * c * shape.vocabulary
    logits = min(max(budget, least * row), tokens * row)
    return logits + (3 * c + 2 * FP32) * tokens * shape.hidden


def _communication(shape: ModelShape, setting: Setting, trained: int, p: int, given: Assumptions) -> float:
    """Buffers of collectives; DeepSpeed's two reduction buckets are never more than the gradients."""
    if p == 1 and setting.offload == "none":
        return 0.0
    if setting.engine == "ddp":
        return FP32 * trained  # the buckets are a copy of all gradients
    buckets = 2 * FP32 * min(given.bucket, trained)
    if setting.shards_weights:
        gathered = given.prefetched_blocks * FP32 * shape.block_parameters
        whole = FP32 * shape.head_parameters  # embeddings or head, gathered for the loss
        reduced = FP32 * shape.block_parameters if setting.engine == "fsdp2" else buckets
        return gathered + whole + reduced
    return buckets
