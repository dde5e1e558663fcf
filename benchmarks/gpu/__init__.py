"""What `scripts/gpu_check.sh` runs on a machine with a GPU, one section per file."""
