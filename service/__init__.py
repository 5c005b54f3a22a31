"""The torch-free service: loads bundles and answers encode, decode, reconstruct, sample, interpolate and score."""

import os

__version__ = "0.2.0"

# Read by ONNX Runtime when it is imported. Its builds for Linux (1.29 and later) otherwise start a thread that reports
# to their maker, and keep an identifier and a database in the home directory; disable_telemetry_events comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
