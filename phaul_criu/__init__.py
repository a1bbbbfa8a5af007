"""CRIU as a Python object: everything that knows criu's rpc messages and the criu binary.

Import from the modules: `criu` (dump, restore, page server, checks), `requests` (their options), `swrk` (one criu
child), `lazy` (the lazy-pages child), `stats`, `logs`, `features`, `install`, `errors`. The package itself imports
nothing, so that `features` and `install` work where criu and pycriu are missing.
"""
