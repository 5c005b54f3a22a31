"""Conformal p-values, false-discovery control, and tests of the calibration data and of drift."""
