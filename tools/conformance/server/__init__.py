"""Cases against a server; the tool is the client."""
