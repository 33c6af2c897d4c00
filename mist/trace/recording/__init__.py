"""Running a model on fake tensors and noting what happens."""
