"""Mesh, data parallelism, engines and the planner. Knows a model only through the blocks it declares."""
