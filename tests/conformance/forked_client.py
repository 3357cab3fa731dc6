"""`python forked_client.py SOCKET DEFECT`: the client of the zygote, as an ordinary command."""

import json
import os
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = json.dumps({"run": sys.argv[2], "env": dict(os.environ)}).encode()
socket.send_fds(connection, [request], [1, 2])
answer = connection.recv(64)
sys.exit(json.loads(answer) if answer else 3)
