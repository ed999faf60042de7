"""What things cost: graph and paths, compute, memory, bounds. Pure functions of specs."""
