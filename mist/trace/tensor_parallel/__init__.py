"""How tensor parallelism divides a model."""
