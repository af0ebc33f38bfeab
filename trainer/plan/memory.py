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
        heap_fragmentation: the same where a CPU process keeps what is freed (`loop.engine.choose_allocation`).
        loss_budget_gpu: bytes of logits that the fused loss holds at a time, student and teacher together.
        loss_budget_cpu: likewise on a CPU.
        bucket: elements of a reduction bucket of ZeRO (`configs/deepspeed/`); ZeRO-1 and 2 have two, for overlap.
        reuse_distance: elements that ZeRO-3 uses between two uses of a weight that it does not let go meanwhile
            (`configs/deepspeed/`): forward and backward through the last layers.
        prefetched_blocks: gathered blocks that FSDP2 or ZeRO-3 hold at a time.
        saved_scale: factor on activations, from calibration.
    """

    runtime_gpu: float = 1.2e9
    runtime_cpu: float = 0.55e9
    fragmentation: float = 0.03
    heap_fragmentation: float = 0.18
    loss_budget_gpu: float = 1280 * 2**20
    loss_budget_cpu: float = 96 * 2**20
    bucket: float = 2e8
    reuse_distance: float = 1e9
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

    The peak is the highest of three moments: the loss (all activations are alive, gradients only if they are being
    accumulated), the last block's backward pass (the loss has gone, the block's weights and gradients are exchanged)
    and the first block's (all gradients, one block's activations).
    """
    given = given or Assumptions()
    trained = trained_parameters(recipe, shape)
    frozen = shape.parameters - (trained if recipe.qat.trainable != "lora" else 0)
    gradients, state = _training_state(cluster, setting, trained)
    weights = FP32 * (trained + frozen) / (cluster.world if setting.shards_weights else 1)
    host = state if setting.offload != "none" else 0.0
    if setting.offload == "parameters":
        host, weights = host + weights, 0.0
    activations = _activations(recipe, shape, cluster, setting) * given.saved_scale
    # ZeRO-3 has made room for gradients before the first step.
    accumulates = micro_steps(recipe, cluster, setting) > 1 or setting.engine == "zero3"
    c = compute_bytes(recipe, cluster)
    teacher, teachers_head = _teacher(shape, setting, c, cluster.world)
    at_loss, at_last, at_first = _communication(shape, cluster, setting, trained, given)
    loss = {
        "gradients": gradients if accumulates else 0.0,
        "teacher": teacher + teachers_head,
        "activations": activations,
        "loss": _loss(recipe, shape, cluster, setting, given),
        "communication": at_loss,
    }
    last_block = loss | {"teacher": teacher, "loss": 0.0, "communication": at_last}
    if setting.engine == "zero2" and not cluster.gpu.is_cpu and setting.offload == "none":
        # The first reduction makes room for all of the share; main memory counts what is written to.
        last_block["gradients"] = gradients
    first_block = last_block | {
        "gradients": gradients,
        "activations": activations / shape.layers,
        "communication": at_first,
    }
    parts = max(loss, last_block, first_block, key=lambda moment: sum(moment.values())) | {
        "weights": weights,
        "optimizer": 0.0 if setting.offload != "none" else state,
        "quantized_weights": _quantized_weights(recipe, shape, cluster, setting),
    }
    return Memory(**parts, runtime=_runtime(cluster, setting, sum(parts.values()), given), host=host)


def _runtime(cluster: Cluster, setting: Setting, allocated: float, given: Assumptions) -> float:
    """What a process has without a model, and what its allocator loses."""
    if not cluster.gpu.is_cpu:
        return given.runtime_gpu + given.fragmentation * allocated
    keeps = setting.engine in ("single", "ddp")
    return given.runtime_cpu + (given.heap_fragmentation if keeps else given.fragmentation) * allocated


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


def _teacher(shape: ModelShape, setting: Setting, c: int, p: int) -> tuple[float, float]:
    """Bytes of the teacher, and of the copy of its head that the loss has where it is sharded."""
    if setting.teacher in ("none", "cached"):
        return 0.0, 0.0
    whole, head = c * shape.parameters, c * shape.head_parameters
    if setting.teacher == "whole":
        return whole, 0.0
    # ZeRO-3 does not let go of a weight that is used outside its own layer's forward pass, as the head is.
    return whole / p + (head if setting.engine == "zero3" else 0), head


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
    """A chunk's logits of student and teacher, and the last hidden states of both with their gradient.

    Without a teacher the loss is not fused: all logits, in fp32 as well, their log-softmax and its gradient.
    """
    c = compute_bytes(recipe, cluster)
    tokens = setting.micro_batch * recipe.data.block_size
    if setting.teacher == "none":
        return (c + 3 * FP32) * tokens * shape.vocabulary
    budget, least = (given.loss_budget_cpu, 64) if cluster.gpu.is_cpu else (given.loss_budget_gpu, 512)
    row = 2 * c * shape.vocabulary
    logits = min(max(budget, least * row), tokens * row)
    return logits + (3 * c + 2 * FP32) * tokens * shape.hidden


def _communication(
    shape: ModelShape, cluster: Cluster, setting: Setting, trained: int, given: Assumptions
) -> tuple[float, float, float]:
    """Buffers of collectives and gathered weights at the loss, and in the last and the first block's backward pass."""
    if setting.engine in ("single", "ddp"):
        buckets = FP32 * trained if setting.engine == "ddp" else 0.0  # a copy of all gradients
        return buckets, buckets, buckets
    gathered = given.prefetched_blocks * FP32 * shape.block_parameters
    gradients = FP32 * trained / shape.layers
    if setting.engine == "fsdp2":
        # What is in no block (embeddings, head, last norm) stays gathered; gradients are copied to be reduced.
        root = FP32 * (shape.parameters - shape.layers * shape.block_parameters)
        return root, root + gathered + 2 * gradients, root + gathered + 2 * gradients
    if setting.engine == "zero3":
        bucket = _buckets(1, trained, cluster, given)
        if not cluster.gpu.is_cpu and setting.offload == "none":
            # Measured, to 0.1 GB on two and four H200s, and not found in DeepSpeed's source: as much again as the
            # gradients' share. It is never written to, for main memory does not show it.
            bucket += FP32 * trained / cluster.world
        # The weights nearest to the loss are kept for the backward pass.
        kept = FP32 * min(shape.parameters, given.reuse_distance / 2)
        return bucket + kept, bucket + kept + gradients, bucket + gathered + gradients
    first, all_of_them = (_buckets(2, n, cluster, given) for n in (trained / shape.layers, trained))
    return 0.0, first + gradients, all_of_them + gradients


def _buckets(number: int, written: float, cluster: Cluster, given: Assumptions) -> float:
    """DeepSpeed's reduction buckets. In main memory, what is not written to takes no room."""
    elements = number * given.bucket
    return FP32 * (min(elements, written) if cluster.gpu.is_cpu else elements)
