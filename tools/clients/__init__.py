"""Clients in other languages, and what checks them."""
