"""Makers, benches and checkers that stand beside the library."""
