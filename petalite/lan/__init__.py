"""Peers on the same local network find each other without an address: DNS-SD over multicast DNS (spec/11).

`announcement` and `addresses` are what an instance says and what of it is believed, `book` is what is known of all
instances; those are pure. `interfaces` asks the machine, `mdns` wraps zeroconf, `discovery` runs it all under Trio.
All that comes out is hints: where to dial. Who answers there is proven by the handshake alone.
"""
