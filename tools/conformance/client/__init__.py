"""Cases against a client; the tool is its servers."""
