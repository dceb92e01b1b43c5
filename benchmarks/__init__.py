"""Measurements of speed and precision, run by hand."""
