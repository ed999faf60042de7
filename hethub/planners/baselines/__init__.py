"""Baselines: simple rules, the search ideas of published planners, and their published cost model."""
