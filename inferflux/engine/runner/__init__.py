"""The runner: from a step's plan to tensors to tokens, and how a runner is built from a configuration."""
