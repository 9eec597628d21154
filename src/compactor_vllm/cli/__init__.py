"""The command line: one file a command, `main.py` joins them.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""
