"""Trio: dial, listen, one connection a peer, request and reply with deadlines."""
