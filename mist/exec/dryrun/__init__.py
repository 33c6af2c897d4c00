"""One rank of each stage on fake tensors."""
