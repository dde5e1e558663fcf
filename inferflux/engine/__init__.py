"""The runtime: token ids in, token ids out."""
