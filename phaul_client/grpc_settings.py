"""What gRPC reads from the environment once, when it is imported: import this before it. Set variables are left alone.

TLS 1.3 and nothing older: gRPC cannot be told so, but it can be told the cipher suites of older versions. The one that
is named needs a pre-shared key, which no connection of gRPC's has, so no older version finds a suite; those of TLS 1.3
are not named there and stay. And no line in the log for each stranger whose handshake fails: that would be theirs to
fill. Whoever embeds the library without the command line decides both alone.
"""

import os
from typing import Final

SETTINGS: Final = {"GRPC_SSL_CIPHER_SUITES": "PSK-AES128-CBC-SHA", "GRPC_VERBOSITY": "ERROR"}

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
