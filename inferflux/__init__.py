"""InferFlux: an LLM inference server and research engine."""
