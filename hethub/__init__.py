"""HetHub: plans, predicts and runs the training of one model on unlike accelerators."""

__version__ = "0.1.0"
