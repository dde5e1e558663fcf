"""The bytes of the KV cache, on every rank: pages on the device, in host memory and in a file, and how they move."""
