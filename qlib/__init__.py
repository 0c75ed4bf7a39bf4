"""Compress image classifiers: calibrate, quantize, and evaluate exactly what will be deployed."""

__version__ = "0.1.0"
