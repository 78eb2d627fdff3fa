"""What clients and workers share: the SDK's session as a machine without I/O, and the connection that runs it."""
