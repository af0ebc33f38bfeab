"""Integer products of quantized activations and packed weights (`op.py`)."""
