"""Everything that is a file: here the Python half, which turns text into token shards (python -m data.prepare)."""
