"""Distillation losses fused with both output heads."""
