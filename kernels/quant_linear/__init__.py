"""The linear layer of quantization-aware training (`op.py`)."""
