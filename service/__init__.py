"""The torch-free service: loads bundles and answers encode, decode, reconstruct, sample, interpolate and score."""

__version__ = "0.1.0"
