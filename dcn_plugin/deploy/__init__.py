"""Detectors out of PyTorch: what the commands ``export`` and ``test-exported`` share. Needs mmdet."""
