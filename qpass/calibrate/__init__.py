"""Calibration algorithms, one a file."""
