"""Speed, as ratios within one run. ``python -m bench`` measures the service against raw ONNX Runtime."""
