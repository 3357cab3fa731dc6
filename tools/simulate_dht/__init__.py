"""A deterministic simulation of `petalite.dht`: the very code that runs in nodes, on virtual time (spec/09,
"Simulation").
"""
