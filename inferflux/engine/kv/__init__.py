"""The KV cache's books, on rank 0: which pages there are, what is in them, where. No torch; `store` has the bytes."""
