"""The swarm's Kademlia (spec/09 and spec/10). Every module here but `node` is pure: time and randomness are
arguments.

`ids` and `contacts` are the words; `routing` knows peers, `lookup` and `region` find those nearest to a key,
`records` and `store` keep what peers say of themselves, `guard` holds rates and back-off, `messages` are the four
requests. `core` joins these into one node that never waits: requests and time in, replies and effects out. `node`
runs it on Trio.
"""
