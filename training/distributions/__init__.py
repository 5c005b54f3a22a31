"""Distributions as plain tensor algebra that exports to ONNX: log_prob, sample from noise, mean."""
