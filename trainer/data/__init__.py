"""Text to train on and text to judge by."""
