"""Measures any server or client of the protocol against spec/, with an engine that shares no code with petalite."""
