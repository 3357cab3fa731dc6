"""Measures any server or client of the protocol against spec/, with an engine of its own that shares no code with petalite."""
