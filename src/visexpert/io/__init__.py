"""Files from outside and files of runs: find them, read them without running code, write them atomically."""
