"""Calibration: ranges from data, and the proofs that what calibration changed is still the same network."""
