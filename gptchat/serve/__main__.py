"""`python -m gptchat.serve`."""

from gptchat.console import cli
from gptchat.serve import main

if __name__ == "__main__":
    cli(main)
