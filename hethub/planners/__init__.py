"""Planners: cost graph, workload and limits in, a plan out. All share the interface in `interface.py`."""
