"""Bytes to meaning and back, without I/O: handshake, records, frames, streams, tensors.

Time and randomness are arguments; nothing here waits, and nothing here knows a socket.
"""
