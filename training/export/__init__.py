"""From a run to a bundle: divergence, graphs, parity with the trainer, staging, calibration, provenance."""
