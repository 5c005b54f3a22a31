"""From a run to a bundle: graphs, parity with the trainer, calibration, publishing."""
