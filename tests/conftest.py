"""For all tests."""

import signal

# Under nohup it is ignored, by all that tests start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
