"""Every bound a peer can press on, and every time a peer can make us wait. Sizes in bytes, times in seconds.

Each name is checked before memory is taken. The comment names the chapter of spec/ that fixes it.
"""

from __future__ import annotations

# Transport (spec/01)
MAX_NETWORK_ID = 64
MAX_KEY_FILE = 4_096
MAX_ADDRESS = 512  # characters of an ADDRESS
MAX_HANDSHAKE_MESSAGE = 1_200
HANDSHAKE_SECONDS = 10.0
MAX_CERTIFICATE = 1_024
CERTIFICATE_SECONDS = 24 * 3600
CERTIFICATE_ISSUE_SECONDS = 12 * 3600  # what we ask for: the middle, so a clock may be wrong either way
CLOCK_SKEW_SECONDS = 10 * 60
RECORD_TAG = 16
MIN_RECORD = 17
MAX_RECORD = 65_535
REKEY_RECORDS = 65_536
CONNECTION_AGE_SECONDS = 24 * 3600.0
MAX_CONNECTIONS = 1_024
MAX_CONNECTIONS_PER_ADDRESS = 64
MAX_IDLE_CONNECTIONS = 64
IDLE_SECONDS = 10.0

# Frames (spec/02)
MAX_FRAME = 65_519
MAX_FRAME_BEFORE_HELLO = 4_096
MAX_DATA = 65_000
MAX_INLINE_BODY = 32 * 1024  # of a body that travels in the frame of its head
MAX_HEAD_FRAME = 16_384  # any frame but DATA and ERR
MAX_METHOD = 64
MAX_AGENT = 128
MAX_OBSERVED = 300
MAX_STREAMS = 256
PING_BYTES = 8
MAX_GOAWAY_TEXT = 256
MAX_ERROR_TEXT = 1_024
PING_BURST = 100
PINGS_PER_SECOND = 20.0

# Streams (spec/03)
MAX_BODY = 64 * 2**20
PEER_BODY_QUOTA = 256 * 2**20
TOTAL_BODY_QUOTA = 1024 * 2**20
BODY_STALL_SECONDS = 10.0
BODY_PROGRESS = 16 * 1024  # bytes of a body, or its rest, that must come within BODY_STALL_SECONDS
GOODBYE_SECONDS = 1.0
PING_AFTER_SECONDS = 0.5
DEAD_AFTER_SECONDS = 2.0
PROGRESS_SECONDS = 0.5
TICK_SECONDS = 0.1  # how often a connection with open requests looks at its clocks
IDLE_TICK_SECONDS = 0.5  # and one without
MAX_DEADLINE_SECONDS = 3600.0
MAX_RETRY_AFTER_SECONDS = 30.0

SHARED_QUANTUM = 16 * 1024  # body bytes in a row while others wait; MAX_DATA for bulk, which anything may overtake
MIN_QUANTUM = 4 * 1024  # no smaller piece is cut for a slow socket
LOW_CLASS_EVERY = 16
WRITE_AHEAD = 256 * 1024
WRITE_AHEAD_SLOW = 8 * 1024
MAX_CONTROL_QUEUE = 256 * 1024  # a peer that reads nothing is not read from either

# msgpack (spec/04)
MAX_NESTING = 16
MAX_ELEMENTS = 4_096
MAX_KEY = 64
MAX_STR = 4_096

# Tensors (spec/05)
MAX_TENSORS = 64
MAX_TENSOR_NAME = 64
MAX_DIMENSIONS = 8
INT8_BLOCK = 64

# Model (spec/06)
MAX_MANIFEST = 2**20

# Sessions (spec/07)
SESSION_ID_BYTES = 16
INFO_SECONDS = 10.0
NEAR_INFO_SECONDS = 3.0  # a server on our own networks answers sooner
MAX_DIRECTORY = 4_096
MAX_PROBE = 256 * 1024
MAX_SAVED_CONTACTS = 64
EXPIRY_SECONDS = 1.0
MAX_RATE = 2**53  # of anything announced per second
MAX_NEXT_HOPS = 8
MAX_ANNOUNCED_ADDRESSES = 6
DRAIN_QUIET_SECONDS = 1.0
PARK_SECONDS = 10.0  # an unused session may be evicted for room after this
MAX_STEP_BYTES = 8 * 2**20
KEPT_REPLY_BYTES = 256 * 2**20  # answers kept for retries, in all
MAX_SESSION_LENGTH = 2**20
MAX_BATCH = 1_024
SESSION_OPEN_SECONDS = 10.0
SESSION_IDLE_SECONDS = 600.0
SESSION_LIFE_SECONDS = 2 * 3600.0
MAX_SESSIONS_PER_PEER = 64
MAX_SESSIONS = 4_096
PEER_CACHE_SHARE = 0.5  # of the cache: what one peer may hold while others want room
PEER_QUEUED_TOKENS = 16_384  # of one peer that wait or run; a single step may have more
MAX_OPENINGS = 256  # opens that wait for room
MAX_OPENINGS_PER_PEER = 4
OPEN_WAIT_SECONDS = 60.0  # how long one waits at most
MAX_AWAIT_AHEAD = 16  # steps that may be awaited before the one that is next
MAX_PUSHES = 2  # of one session, on their way to the next peer
PUSH_SECONDS = 30.0
PREFILL_TOKENS = 256
PREFILL_BYTES = 2 * 2**20
QUICK_SECONDS = 0.1  # a server that answers so large a step within this time gets larger ones
QUICK_FACTOR = MAX_STEP_BYTES // PREFILL_BYTES
MAX_HOPS = 16
SHORT_STEP_TOKENS = 32  # over all rows: a decode step, which overtakes prefills and may be pushed
MAX_HISTORY_BYTES = 4 * 2**30  # of kept inputs, for one session of a client
DIAL_SECONDS = DEAD_AFTER_SECONDS  # for a connection to one server of a session; another may be free
PIECE_SECONDS = 60.0  # for one step on one server, however busy it says it is
ROOM_SECONDS = 2.0  # of waiting for cache room while holding some
REPLACE_SECONDS = 120.0  # of looking for a server
MAX_BLOCKS = 4_096  # of one model
MAX_WORD = 64  # bytes of a name, version or codec in a message

# Training (spec/15)
MAX_TRAINING_TOKENS = 8_192  # rows x tokens of one request
MAX_TRAINING_BYTES = 2 * 2**30  # working memory of one request
PEER_TRAINING_TOKENS = 32_768  # of one peer that wait or run; a single request may have more
MAX_LORA_RANK = 256
MAX_ADAPTER_BYTES = 32 * 2**20  # of one request
MAX_ADAPTERS = 8  # that a server holds and announces
TRAINING_SECONDS = 120.0  # for one request to one server, however busy it says it is

# DHT (spec/09). Times in seconds.
DHT_K = 20
DHT_ALPHA = 3
DHT_TAIL_ALPHA = 8  # once the nearest known peer has answered, the rest of the k must be asked anyway
DHT_PATHS = 4
DHT_SIBLINGS = 16
DHT_REPLACEMENTS = 10
DHT_BUCKET_PER_SUBNET = 2
DHT_TABLE_PER_SUBNET = 10
DHT_QUORUM = 3
DHT_MAX_ASKED = 160
DHT_MIN_TIMEOUT = 0.5
DHT_MAX_TIMEOUT = 3.0
DHT_FIRST_TIMEOUT = 1.0
DHT_REFRESH_SECONDS = 3600.0
DHT_TICK_SECONDS = 30.0
DHT_SAMPLE_SECONDS = 600.0  # a lookup of a random id, to learn how many peers there are
DHT_CHECK_AFTER_SECONDS = 300.0  # a contact silent for longer is pinged before a newcomer may take its place
DHT_MARKS = 3  # offences after which a peer leaves the table
DHT_MARK_SECONDS = 600.0
DHT_RATE = 20.0  # requests a second from one peer, and how many at once
DHT_BURST = 100.0
DHT_MAX_RATED_PEERS = 4_096
DHT_DIAL_BURST = 20.0  # dials to one host at once, and then a second
DHT_DIAL_RATE = 1.0
DHT_BACKOFF_SECONDS = 10.0
DHT_MAX_BACKOFF_SECONDS = 600.0
DHT_MAX_BACKOFFS = 4_096
DHT_MAX_SEEDS = 64
DHT_REMEMBERED_RECORDS = 1_024  # whose signatures need no second look
MAX_CONTACT_ADDRESSES = 4
MAX_CONTACT_ADDRESS = 56

# DHT records (spec/10)
MAX_RECORD_PAYLOAD = 1_000
MAX_RECORDS_PER_MESSAGE = 10
MAX_RECORD_PAGES = 32
RECORD_EXPIRY_SECONDS = 3600
ANNOUNCEMENT_EXPIRY_SECONDS = 600
RECORDS_PER_PEER = 64
RECORDS_PER_SUBNET = 256
RECORDS_TOTAL = 50_000
SUBKEYS_PER_KEY = 256
SUBKEY_STALE_SECONDS = 300

# LAN discovery (spec/11). Times in seconds.
MAX_LAN_TXT = 400  # bytes of one TXT record, strings' length bytes included
MAX_LAN_ADDRESSES = 8  # of one instance that are published
MAX_LAN_DIALS = 4  # of one instance that are dialled
MAX_LAN_INSTANCES = 256  # remembered at a time, foreign ones included
LAN_LIFETIME_SECONDS = 120.0  # an instance is believed no longer than this after it was last heard, whatever its TTL
LAN_MIN_LIFETIME_SECONDS = 10.0  # nor less: a TTL of 1 would have us ask all the time
LAN_REFRESH_SHARE = 0.75  # of the lifetime, after which it is asked again
LAN_RETRY_SECONDS = 2.0
LAN_RESOLVE_SECONDS = 1.5
LAN_RESOLVERS = 4  # instances asked at a time
LAN_PENDING_EVENTS = 1_024  # appearances and departures not yet looked at; more are dropped
LAN_INTERFACE_SECONDS = 3.0  # how often the machine's addresses are looked at
LAN_GOODBYE_SECONDS = 2.0
REACH_SECONDS = 4.0  # one dial back on request
REACH_AT_ONCE = 4
