"""Measured profiles: format, readers, curves, importers."""
