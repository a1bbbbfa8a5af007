"""CRIU as a Python object: everything that knows pycriu's rpc messages and the criu binary."""
