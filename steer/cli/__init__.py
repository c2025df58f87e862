"""The command line: `steer`.

Commands import what they run when they run it, so that help and completion answer at once.
"""

from steer.cli.app import app

__all__ = ["app"]
