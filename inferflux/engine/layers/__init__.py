"""The parts decoders are made of. Each gets all it needs as arguments and computes through a KernelSet."""
