"""Fuzz targets: one short function a decoder, and whole connections. `python fuzz/run.py` runs them."""
