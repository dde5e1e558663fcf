"""The fast path on CPUs and the fallback everywhere else: stock PyTorch operators, as few and as large as possible."""
