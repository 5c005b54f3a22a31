"""Anomaly maps: how unusual each place of a row is, that is each position (h, w) of [C,H,W]."""
