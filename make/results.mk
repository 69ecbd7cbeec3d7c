# Results pages: one target per page, `results-NAME`, that writes docs/results/ from runs/.
# A finished run is not run again; an interrupted one goes on from its last checkpoint.

JOBS ?= 2

.PHONY: results-tove
results-tove: $(STAMP) ## Measure ToVE on Tabletop: every variant, three seeds (about two hours on two cores, resumable)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.results_tove --jobs $(JOBS)

.PHONY: results-merge
results-merge: $(STAMP) ## Measure detachment and merging against their controls, three seeds (about two hours on two cores, resumable)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.results_merge --jobs $(JOBS)

.PHONY: results-movekd
results-movekd: $(STAMP) ## Measure MoVE-KD on Tabletop: main rows, little text, ablations, three seeds (hours on two cores, resumable)
	$(PY) -m benchmarks.tune_movekd --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.results_movekd --jobs $(JOBS)

.PHONY: results-distill
results-distill: $(STAMP) ## Measure what agglomerative encoders add to distillation from images alone, three seeds (half an hour on two cores, resumable)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.results_distill --jobs $(JOBS)

.PHONY: results-comparison
results-comparison: $(STAMP) ## Compare both methods and their mixes: the matrix at the default scale, shares of the scenes (about two hours on two cores, resumable)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.results_comparison --jobs $(JOBS)

.PHONY: families
families: $(STAMP) ## Try every family of encoders and language models on tiny random weights, docs/families.md (minutes, resumable)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.families
