"""`python -m steer`: the command line, where its script is not on the path."""

from steer.cli import app

if __name__ == "__main__":
    app(prog_name="steer")
