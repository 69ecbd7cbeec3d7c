# Results pages: one target per page, `results-NAME`, that writes docs/results/ from runs/.
# Each run is a target of its own (a file in its run folder), so that a finished run is not run again.
