"""Claims as commands: `make proof-<name>` runs one at full size and writes `proof/<name>.json`."""
