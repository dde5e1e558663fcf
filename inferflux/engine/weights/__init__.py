"""Weights on disk: safetensors files, the folder that holds them, and how they become tensors in memory."""
