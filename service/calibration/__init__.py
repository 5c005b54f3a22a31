"""Calibration of scores: conformal p-values, false-discovery control, and tests for contamination and drift."""
