"""What holds for all tests."""

import signal

# A shell that starts the tests in the background has them ignore SIGINT, and so would every program they start and
# interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
