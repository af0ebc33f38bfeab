"""What a decoder of LLaMA's kind computes between its linear layers, for inference on the CPU."""
