"""Ranks: how the processes that share a model connect, divide it, exchange tensors and notice that one is lost."""
