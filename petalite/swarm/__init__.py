"""One peer's view of the swarm: who serves which blocks, which way a token takes, which blocks a server should hold.

`snapshot` is the data, `routing` and `placement` are pure planners over it: state in, decision out. They know no
clock, no network and no model; time, randomness and measurements are arguments.
"""
