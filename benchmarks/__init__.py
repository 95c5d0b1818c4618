"""Benchmarks of dcn_plugin beside dense convolutions and its peers: `python -m benchmarks --help`."""
