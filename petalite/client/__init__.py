"""Uses a swarm: inference sessions that survive their servers, generation, and the calls of the library."""
