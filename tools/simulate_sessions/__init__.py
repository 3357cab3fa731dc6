"""A swarm in memory under a mock clock, in which any server fails at any message: does the text stay the same?"""
