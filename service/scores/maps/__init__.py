"""Anomaly maps: how unusual each pixel (or place of a row) is."""
