"""Sampling: how logits become a token, with penalties, biases, grammar masks and log-probabilities."""
