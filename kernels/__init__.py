"""Quantization kernels: tensors in, tensors out.

Nothing is imported before it is asked for, so that importing this package needs no GPU, no compiler and no
Triton, and so that a library that finds a folder named `kernels` on its path gets an empty module.
"""

from importlib import import_module
from typing import Any

# Public name -> the submodule that defines it.
_PUBLIC = {
    "distillation_loss": "distillation.loss",
    "topk_distillation_loss": "distillation.loss",
    "Scheme": "scheme",
    "choose_range": "ranges",
    "dequantize": "grid",
    "fake_quantize": "fake_quant.op",
    "fake_quantize_dynamic": "fake_quant.dynamic",
    "pack": "packing",
    "packed_features": "packing",
    "quantize": "grid",
    "quantize_dynamic": "fake_quant.dynamic",
    "scale_from_clip": "ranges",
    "unpack": "packing",
    "count_products": "common.launches",
    "use_backend": "common.backend",
    "int_matmul": "int_gemm.op",
    "quantize_activations": "int_gemm.op",
    "packed_linear": "int_gemm.op",
    "prepare_unpacked": "int_gemm.weights",
    "prepare_weight": "int_gemm.weights",
    "PreparedWeight": "int_gemm.weights",
    "quantized_linear": "quant_linear.op",
    "rms_norm": "decoder.ops",
    "silu_product": "decoder.ops",
    "attention": "decoder.ops",
    "FusedLayer": "decoder.layer",
    "LayerShape": "decoder.layer",
    "LinearParts": "decoder.layer",
    "quantize_kv": "kv_cache.op",
    "dequantize_kv": "kv_cache.op",
    "fake_quantize_kv": "kv_cache.op",
    "kv_scheme": "kv_cache.op",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
