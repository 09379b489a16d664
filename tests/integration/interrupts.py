"""Programs that heed Ctrl-C, also where the test run itself was started in the background."""

import signal


def heed_interrupts():
    """For `Popen(preexec_fn=...)`: a shell's background job hands SIGINT on as ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
