"""Files from outside and files of runs: how they are found, read without running code, and written whole."""
