"""Experiment trackers: wandb and TensorBoard through Accelerate, and what only wandb has."""
