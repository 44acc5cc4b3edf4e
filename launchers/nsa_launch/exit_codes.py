"""What the exit code of a run says to a shell, a scheduler or a Ray job."""

OK = 0  # trained to the last step, or stopped on request through the STOP file
FAILED = 1  # training failed more often than launch.max_failures allows
BAD_CONFIG = 2  # refused before Ray or any process was started
# The cluster never had room, its controller kept dying, or a Ray of one's own did not start: submit again (sysexits'
# EX_TEMPFAIL).
NO_RESOURCES = 75


def stopped_by(signal_number: int) -> int:
    """The shell's convention: 130 after Ctrl-C, 143 after SIGTERM. A checkpoint was saved first, if time allowed."""
    return 128 + signal_number
