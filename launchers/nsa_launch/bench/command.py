"""`nsa-dist bench`: who does what was asked for."""

from nsa_launch import exit_codes
from nsa_launch.bench import ranks, share
from nsa_launch.bench.request import Request


def run(request: Request) -> int:
    """The exit code."""
    failed = share.run(request) if request.place is None else ranks.run(request, request.place)
    return exit_codes.FAILED if failed else exit_codes.OK
