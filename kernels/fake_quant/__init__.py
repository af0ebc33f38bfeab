"""Fake-quantization: quantize and dequantize in one differentiable step (`op.py`)."""
