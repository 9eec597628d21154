"""The page at /: ask about a document with the full cache and with a compressed one, and see what was kept."""
